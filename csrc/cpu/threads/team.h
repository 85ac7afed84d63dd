// The threads of one parallel region, which go through the phases of a call together.
//
// A phase has items, a contiguous range for every worker, as parallel_for would split them. A
// worker whose range is used up takes from the others, so one that lost its CPU holds up a single
// item. The next phase begins when all items are finished. Nobody waits for a worker, only for
// items that workers have taken: a call cannot hang when the pool starts fewer threads than
// planned, or runs them in turn.
#pragma once

#include <cstdint>

#include "cpu/packing/layout.h"
#include "cpu/tuning.h"

namespace permllm::cpu {

// What the workers of a call share. Its functions and those of Worker that are no templates are
// compiled for any CPU, in team.cpp.
class Team {
 public:
  explicit Team(int64_t workers);

 private:
  friend class Worker;

  // How many of its items were taken, over all phases.
  struct alignas(64) Range {
    int64_t taken;
  };

  const int64_t workers_;
  Range ranges_[CommonTuning::kMostRanges];
  alignas(64) int64_t finished_ = 0;  // items, over all phases
};

// One worker's way through the phases. All workers of a team go through the same ones.
class Worker {
 public:
  Worker(Team& team, int64_t index) : team_(team), index_(index) {}
  ~Worker() { finish_taken(); }  // whose items an exception leaves unfinished, nobody waits for
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  int64_t count() const { return team_.workers_; }

  // Ends this worker's part of the phase before. Returns when every item of it is finished, and its
  // results are visible; then `size` items stand in `ranges` ranges, of which the first are those
  // of the first workers.
  void begin(int64_t size, int64_t ranges);

  // The next item of the phase for this worker, or -1 when none is left.
  int64_t claim();

  // A phase: body(item) for items 0..size-1.
  template <class Body>
  void each(int64_t size, Body body) {
    if (size == 0) return;
    if (count() == 1) {
      for (int64_t item = 0; item < size; ++item) body(item);
    } else {
      begin(size, count());
      for (int64_t item; (item = claim()) >= 0;) body(item);
    }
  }

  // A phase that one worker does: its work takes less than sharing it would.
  template <class Body>
  void alone(Body body) {
    each(1, [&](int64_t) { body(); });
  }

  // A phase: body(begin, end) for a contiguous range of 0..size-1 for every worker, the one that
  // parallel_for would give it. In the last phase of a call none takes another's.
  template <class Body>
  void share(int64_t size, bool last, Body body) {
    const int64_t range = ceil_div(size, count()), ranges = ceil_div(size, range);
    const auto of = [&](int64_t worker) {
      const int64_t first = worker * range;
      body(first, first + range < size ? first + range : size);
    };
    if (!last) return each(ranges, of);
    begin(0, 1);
    if (index_ < ranges) of(index_);
  }

 private:
  void finish_taken();

  Team& team_;
  const int64_t index_;
  int64_t before_ = 0;  // items of the phases before this one
  int64_t size_ = 0;    // items of this one
  int64_t ranges_ = 1;  // in which they stand
  int64_t step_ = 0;    // of every range but the last ones
  int64_t first_ = 0;   // as Team::Range::taken counts: the first item of every range
  int64_t taken_unfinished_ = 0;
};

}  // namespace permllm::cpu
