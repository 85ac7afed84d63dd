#include "cpu/packing/four_bits.h"

#include <atomic>

#include "cpu/threads/threads.h"

namespace permllm::cpu {

bool fit_four_bits(const int8_t* values, int64_t n, int64_t k) {
  std::atomic<bool> fit{true};
  parallel_for(n, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t first = 0; first < k; first += kBlockInputs) {
        if (!fit.load(std::memory_order_relaxed)) return;
        const int8_t* own = values + (row * k + first) / 2;
        const int64_t count = smaller(kBlockInputs, k - first) / 2;
        if (multiplier_of(own, count) == 0) fit.store(false, std::memory_order_relaxed);
      }
    }
  });
  return fit;
}

}  // namespace permllm::cpu
