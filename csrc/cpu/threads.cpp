#include "threads.h"

#include <torch/csrc/stable/ops.h>

namespace permllm::cpu {

int64_t thread_count() { return torch::stable::get_num_threads(); }

void parallel_ranges(int64_t count, void (*body)(void* context, int64_t begin, int64_t end),
                     void* context) {
  torch::stable::parallel_for(0, count, /*grain_size=*/1, [=](int64_t begin, int64_t end) {
    if (begin < end) body(context, begin, end);
  });
}

}  // namespace permllm::cpu
