#include "cpu/threads/threads.h"

#include <torch/csrc/stable/ops.h>

#include <exception>
#include <mutex>

namespace permllm::cpu {

int64_t thread_count() { return torch::stable::get_num_threads(); }

void parallel_ranges(int64_t count, void (*body)(void* context, int64_t begin, int64_t end),
                     void* context) {
  std::mutex guard;
  std::exception_ptr first;  // torch's interface is one of C, which passes on its text alone
  torch::stable::parallel_for(0, count, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    try {
      body(context, begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      if (first == nullptr) first = std::current_exception();
    }
  });
  if (first != nullptr) std::rethrow_exception(first);
}

}  // namespace permllm::cpu
