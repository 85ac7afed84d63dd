#include "cpu/experts/rows.h"

namespace permllm::cpu {

template <class Real>
ExpertSteps<Real> avx2_expert_steps() {
  return kSteps<Real>;
}

template ExpertSteps<bf16> avx2_expert_steps();
template ExpertSteps<fp16> avx2_expert_steps();
template ExpertSteps<float> avx2_expert_steps();

}  // namespace permllm::cpu
