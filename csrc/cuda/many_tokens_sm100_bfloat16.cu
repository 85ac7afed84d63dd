#include "kernels.h"
#include "many_tokens_sm100.h"

namespace permllm::cuda {

int many_tokens_sm100_bfloat16(const LinearArguments& arguments, int tile, const Device& device,
                               void* stream) {
  return sm100::run<cutlass::bfloat16_t>(arguments, tile, device, stream);
}

}  // namespace permllm::cuda
