#include "kernels.h"
#include "many_tokens_sm100.h"

namespace permllm::cuda {

int many_tokens_sm100_float16(const LinearArguments& arguments, int tile, const Device& device,
                              void* stream) {
  return sm100::run<cutlass::half_t>(arguments, tile, device, stream);
}

}  // namespace permllm::cuda
