// The phases of a kernel: activations are prepared, then multiplied.
#pragma once

#include "cpu/kernels.h"
#include "cpu/threads/team.h"

namespace permllm::cpu {
namespace {

// What every worker does for a kernel, a class with
//   kPreparedAlone             elements of x that one worker prepares as fast as all together
//   elements()                 of x
//   measures(), measure(item)  items of a first phase, any number; an item is a token
//   packs(), pack(item)        items of the second phase, which sees the results of the first
//   groups(), run(begin, end)  row groups, which see packed x; a contiguous range for every worker,
//                              the one that it touched first when the weight was packed
template <class Kernel>
void go_through(const Kernel& kernel, bool last, Worker& worker) {
  const int64_t measures = kernel.measures(), packs = kernel.packs();
  if (kernel.elements() <= Kernel::kPreparedAlone) {
    worker.alone([&] {
      for (int64_t item = 0; item < measures; ++item) kernel.measure(item);
      for (int64_t item = 0; item < packs; ++item) kernel.pack(item);
    });
  } else {
    worker.each(measures, [&](int64_t item) { kernel.measure(item); });
    worker.each(packs, [&](int64_t item) { kernel.pack(item); });
  }
  worker.share(kernel.groups(), last, [&](int64_t begin, int64_t end) { kernel.run(begin, end); });
}

// A kernel for many tokens, kPackedTokens of them at a time: packed x stays in the cache.
template <class Kernel, class Real>
void go_through_parts(const LinearOf<Real>& a, Worker& worker) {
  for (int64_t first = 0; first < a.m; first += Kernel::kPackedTokens) {
    const int64_t left = a.m - first;
    const LinearOf<Real> part =
        part_of(a, first, left < Kernel::kPackedTokens ? left : Kernel::kPackedTokens);
    go_through(Kernel(part), part.last, worker);
  }
}

}  // namespace
}  // namespace permllm::cpu
