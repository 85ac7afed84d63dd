#include "cpu/threads/region.h"

#include <algorithm>

#include "cpu/memory/scratch.h"
#include "cpu/tuning.h"

namespace permllm::cpu {

template <class Real>
void run_in_region(const KernelOf<Real>& kernel, const LinearOf<Real>& arguments,
                   const int32_t* gather) {
  LinearOf<Real> a = arguments;
  const int64_t at_once = gather == nullptr ? a.m : std::min(a.m, CommonTuning::kGatheredTokens);
  const InputMemory memory = input_memory(kernel, at_once, a.k);
  a.packed_x = scratch_of<char>(Scratch::kActivations, memory.bytes);
  a.token_scales = scratch_of<float>(Scratch::kTokenScales, memory.scales);
  Real* gathered =
      gather == nullptr ? nullptr : scratch_of<Real>(Scratch::kGathered, at_once * a.k);

  in_region([&](Worker& worker) {
    if (gather == nullptr) return kernel.run(a, worker);
    for (int64_t first = 0; first < a.m; first += at_once) {
      LinearOf<Real> part = part_of(a, first, std::min(at_once, a.m - first));
      worker.each(part.m, [&](int64_t token) {
        const Real* source = part.x + token * part.x_stride;
        Real* target = gathered + token * part.k;
        for (int64_t i = 0; i < part.k; ++i) target[i] = source[gather[i]];
      });
      part.x = gathered;
      part.x_stride = part.k;
      kernel.run(part, worker);
    }
  });
}

template void run_in_region(const KernelOf<bf16>&, const LinearOf<bf16>&, const int32_t*);
template void run_in_region(const KernelOf<fp16>&, const LinearOf<fp16>&, const int32_t*);
template void run_in_region(const KernelOf<float>&, const LinearOf<float>&, const int32_t*);

}  // namespace permllm::cpu
