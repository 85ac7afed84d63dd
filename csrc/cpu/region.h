// One parallel region for a call: activations are prepared in it, then multiplied.
#pragma once

#include "layout.h"
#include "threads.h"
#include "tuning.h"
#include "work_queue.h"

namespace permllm::cpu {
namespace {

// Runs a kernel, a class with
//   elements()                 of x
//   measures(), measure(item)  items of a first phase, any number; an item is a token
//   packs(), pack(item)        items of the second phase, which sees the results of the first
//   groups(), run(begin, end)  row groups, which see packed x; a contiguous range for every thread,
//                              the one that it touched first when the weight was packed
template <class Kernel>
void run_in_one_region(const Kernel& kernel) {
  const int64_t measures = kernel.measures(), packs = kernel.packs(), groups = kernel.groups();
  const int64_t threads = thread_count();
  const int64_t workers = threads < groups ? threads : groups;
  const bool alone = workers == 1 || kernel.elements() <= Zen4Tuning::kPreparedAlone;
  if (alone) {
    for (int64_t item = 0; item < measures; ++item) kernel.measure(item);
    for (int64_t item = 0; item < packs; ++item) kernel.pack(item);
  }
  WorkQueue measured(alone ? 0 : measures, workers), packed(alone ? 0 : packs, workers);
  const int64_t share = ceil_div(groups, workers);
  parallel_for(workers, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      measured.work(worker, [&](int64_t item) { kernel.measure(item); });
      packed.work(worker, [&](int64_t item) { kernel.pack(item); });
      const int64_t begin = worker * share;
      const int64_t end = begin + share < groups ? begin + share : groups;
      if (begin < end) kernel.run(begin, end);
    }
  });
}

}  // namespace
}  // namespace permllm::cpu
