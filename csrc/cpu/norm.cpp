#include "cpu/norm.h"

#include "cpu/isa.h"
#include "cpu/threads/threads.h"

namespace permllm::cpu {

#if defined(PERMLLM_AVX2)

bool has_norm() { return select("") != Isa::kPortable; }

template <class Real, class Weight>
void norm(const NormOf<Real, Weight>& a) {
  if (a.m == 1) return avx2_norm(a, 0, 1);
  parallel_for(a.m, [&](int64_t first, int64_t last) { avx2_norm(a, first, last); });
}

#else

bool has_norm() { return false; }

template <class Real, class Weight>
void norm(const NormOf<Real, Weight>&) {}

#endif

template void norm(const NormOf<bf16, bf16>&);
template void norm(const NormOf<bf16, float>&);
template void norm(const NormOf<fp16, fp16>&);
template void norm(const NormOf<fp16, float>&);
template void norm(const NormOf<float, float>&);

}  // namespace permllm::cpu
