// Work that the threads of one parallel region share out among themselves.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

#include "layout.h"
#include "tuning.h"

namespace permllm::cpu {
namespace {

// Items 0..size-1, a contiguous range for every worker, as parallel_for would split them. A worker
// whose range is used up takes from the others, so one that lost its CPU holds up a single item.
// `wait` lets one region hold two phases: it waits only for items that running threads have taken,
// so it cannot hang when the pool starts fewer threads than planned, or runs them in turn.
class WorkQueue {
 public:
  WorkQueue(int64_t size, int64_t workers)
      : size_(size), ranges_(workers < kMaxRanges ? workers : kMaxRanges) {
    const int64_t step = ceil_div(size, ranges_);
    for (int64_t r = 0; r < ranges_; ++r) {
      range_[r].next.store(r * step, std::memory_order_relaxed);
      range_[r].end = (r + 1) * step < size ? (r + 1) * step : size;
    }
  }

  // The next item for this worker, or -1 when none is left.
  int64_t claim(int64_t worker) {
    for (int64_t i = 0; i < ranges_; ++i) {
      Range& range = range_[(worker + i) % ranges_];
      if (range.next.load(std::memory_order_relaxed) >= range.end) continue;
      const int64_t item = range.next.fetch_add(1, std::memory_order_relaxed);
      if (item < range.end) return item;
    }
    return -1;
  }

  // Works on items until none is left, then waits until all are finished.
  template <class Body>
  void work(int64_t worker, Body body) {
    for (int64_t item; (item = claim(worker)) >= 0; finish()) body(item);
    wait();
  }

  void finish() { finished_.fetch_add(1, std::memory_order_release); }

  // Call when `claim` gave -1: returns when every item is finished, and its results are visible.
  void wait() const {
    for (int spin = 0; finished_.load(std::memory_order_acquire) < size_; ++spin) {
      if (spin < CommonTuning::kSpins) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        sched_yield();
      }
    }
  }

 private:
  static constexpr int64_t kMaxRanges = 64;  // more workers than that share them

  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };

  const int64_t size_;
  const int64_t ranges_;
  Range range_[kMaxRanges];
  alignas(64) std::atomic<int64_t> finished_{0};
};

}  // namespace
}  // namespace permllm::cpu
