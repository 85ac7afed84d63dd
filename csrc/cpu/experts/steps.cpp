#include "cpu/experts/steps.h"

namespace permllm::cpu {

template <class Real>
ExpertSteps<Real> steps_of(Isa isa) {
  switch (isa) {
#if defined(PERMLLM_AVX512_FLOAT32)
    case Isa::kAmx:
    case Isa::kZen5:
    case Isa::kAvx512Bf16:
    case Isa::kAvx512Vbmi2:
    case Isa::kAvx512Vnni:
    case Isa::kAvx512:
      return avx512_expert_steps<Real>();
#endif
#if defined(PERMLLM_AVX2)
    case Isa::kAvx2Vnni:
    case Isa::kAvx2:
      return avx2_expert_steps<Real>();
#endif
    default:
      return portable_expert_steps<Real>();
  }
}

template ExpertSteps<bf16> steps_of(Isa);
template ExpertSteps<fp16> steps_of(Isa);
template ExpertSteps<float> steps_of(Isa);

}  // namespace permllm::cpu
