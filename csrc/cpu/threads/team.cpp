#include "cpu/threads/team.h"

#include <sched.h>

#include <algorithm>
#include <atomic>

namespace permllm::cpu {

Team::Team(int64_t workers) : workers_(workers) {
  const int64_t ranges = std::min(workers, CommonTuning::kMostRanges);
  for (int64_t r = 0; r < ranges; ++r) ranges_[r].taken = 0;
}

void Worker::begin(int64_t size, int64_t ranges) {
  finish_taken();
  before_ += size_;
  first_ += step_;
  size_ = size;
  ranges_ = std::min({ranges, count(), CommonTuning::kMostRanges});
  step_ = ceil_div(size, ranges_);
  const std::atomic_ref<int64_t> finished(team_.finished_);
  for (int spin = 0; finished.load(std::memory_order_acquire) < before_; ++spin) {
    if (spin < CommonTuning::kSpins) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    } else {
      sched_yield();
    }
  }
}

int64_t Worker::claim() {
  int64_t range = index_ % ranges_;
  for (int64_t i = 0; i < ranges_; ++i) {
    const int64_t end = std::min(first_ + step_, first_ + size_ - range * step_);
    const std::atomic_ref<int64_t> taken(team_.ranges_[range].taken);
    // Less than `first_` where the range had fewer items than others in an earlier phase; past
    // `end` where others are in a later one.
    int64_t next = taken.load(std::memory_order_relaxed);
    while (next < end) {
      const int64_t item = std::max(next, first_);
      if (item >= end) break;
      if (taken.compare_exchange_weak(next, item + 1, std::memory_order_relaxed)) {
        ++taken_unfinished_;
        return range * step_ + item - first_;
      }
    }
    if (++range == ranges_) range = 0;
  }
  return -1;
}

void Worker::finish_taken() {
  if (taken_unfinished_ == 0) return;
  std::atomic_ref<int64_t>(team_.finished_).fetch_add(taken_unfinished_, std::memory_order_release);
  taken_unfinished_ = 0;
}

}  // namespace permllm::cpu
