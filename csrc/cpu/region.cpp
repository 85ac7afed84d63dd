#include "region.h"

#include <algorithm>

#include "scratch.h"
#include "threads.h"
#include "tuning.h"

namespace permllm::cpu {
namespace {

constexpr int64_t kTokenUnit = 16;  // that packed tokens are padded to, as kernels.h says

int64_t padded(int64_t count, int64_t unit) { return ceil_div(count, unit) * unit; }

template <class Real>
Real* allocate(Scratch kind, int64_t count) {
  return static_cast<Real*>(thread_scratch(kind, count * sizeof(Real)));
}

}  // namespace

template <class Real>
void run_in_region(const KernelOf<Real>& kernel, const LinearOf<Real>& arguments,
                   const int32_t* gather) {
  LinearOf<Real> a = arguments;
  const int64_t at_once = gather == nullptr ? a.m : std::min(a.m, CommonTuning::kGatheredTokens);
  const int64_t tokens = padded(std::min(at_once, kernel.packed_tokens), kTokenUnit);
  a.packed_x = allocate<char>(Scratch::kActivations,
                              tokens * padded(a.k, kBlockInputs) * kernel.input_bytes);
  a.token_scales = allocate<float>(Scratch::kTokenScales, 2 * tokens);
  Real* gathered = gather == nullptr ? nullptr : allocate<Real>(Scratch::kGathered, at_once * a.k);

  const auto run = [&](Worker& worker) {
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
  };
  const int64_t workers = thread_count();
  Team team(workers);
  parallel_for(workers, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      Worker worker(team, index);
      run(worker);
    }
  });
}

template void run_in_region(const KernelOf<bf16>&, const LinearOf<bf16>&, const int32_t*);
template void run_in_region(const KernelOf<fp16>&, const LinearOf<fp16>&, const int32_t*);
template void run_in_region(const KernelOf<float>&, const LinearOf<float>&, const int32_t*);

}  // namespace permllm::cpu
