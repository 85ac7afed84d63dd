#include "kernels.h"
#include "many_tokens_sm90.h"

namespace permllm::cuda {

int many_tokens_sm90_float16(const LinearArguments& arguments, int tile, const Device& device,
                             void* stream) {
  return sm90::run<cutlass::half_t>(arguments, tile, device, stream);
}

}  // namespace permllm::cuda
