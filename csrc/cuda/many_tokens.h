// The kernels for many tokens that this build has, and the call of the one that was chosen.
#pragma once

#include "kernel_choice.h"
#include "kernels.h"

namespace permllm::cuda {

// By what build.py defines.
constexpr CutlassKernels kBuilt = [] {
  CutlassKernels built{};
#ifdef PERMLLM_SM90
  built.sm90 = true;
#endif
#ifdef PERMLLM_SM100
  built.sm100 = true;
#endif
#ifdef PERMLLM_SM103
  built.sm103 = true;
#endif
  return built;
}();

// Returns a cudaError_t. Refers to no kernel that this build lacks.
inline int many_tokens(LinearKernel kernel, int tile, const LinearArguments& arguments,
                       const Device& device, void* stream) {
  const bool float16 = arguments.element == ElementType::kFloat16;
  if constexpr (kBuilt.sm90) {
    if (kernel == LinearKernel::kManyTokensSm90) {
      return float16 ? many_tokens_sm90_float16(arguments, tile, device, stream)
                     : many_tokens_sm90_bfloat16(arguments, tile, device, stream);
    }
    if (kernel == LinearKernel::kManyTokensSm90Permuting) {
      return float16 ? many_tokens_sm90_permuting_float16(arguments, tile, device, stream)
                     : many_tokens_sm90_permuting_bfloat16(arguments, tile, device, stream);
    }
  }
  if constexpr (kBuilt.sm100) {
    if (kernel == LinearKernel::kManyTokensSm100) {
      return float16 ? many_tokens_sm100_float16(arguments, tile, device, stream)
                     : many_tokens_sm100_bfloat16(arguments, tile, device, stream);
    }
  }
  return many_tokens_mma(arguments, tile, device, stream);
}

}  // namespace permllm::cuda
