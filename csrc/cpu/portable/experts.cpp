#include "cpu/experts/rows.h"

namespace permllm::cpu {

template <class Real>
ExpertSteps<Real> portable_expert_steps() {
  return kSteps<Real>;
}

template ExpertSteps<bf16> portable_expert_steps();
template ExpertSteps<fp16> portable_expert_steps();
template ExpertSteps<float> portable_expert_steps();

}  // namespace permllm::cpu
