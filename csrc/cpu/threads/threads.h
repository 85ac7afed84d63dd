// Parallel loops over torch's own thread pool, so that the process keeps one OpenMP runtime.
#pragma once

#include <cstdint>

namespace permllm::cpu {

// Number of threads that a parallel_for may use.
int64_t thread_count();

// Splits [0, count) into one contiguous range per thread and calls body(context, begin, end) on
// each. The same count and thread count give the same split, so what one call touches first, the
// same thread reads in the next. The first exception that a body throws arrives at the
// caller, as it was thrown.
void parallel_ranges(int64_t count, void (*body)(void* context, int64_t begin, int64_t end),
                     void* context);

// As above for any callable `body(int64_t begin, int64_t end)`.
template <class F>
void parallel_for(int64_t count, F body) {
  parallel_ranges(
      count,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); },
      &body);
}

}  // namespace permllm::cpu
