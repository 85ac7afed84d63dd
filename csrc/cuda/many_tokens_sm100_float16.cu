#include "kernels.h"
#include "many_tokens_sm100.h"

namespace permllm::cuda {

int many_tokens_sm100_float16(const LinearArguments& arguments, const Device& device, int index,
                              void* stream) {
  return sm100::run<cutlass::half_t>(arguments, device, index, stream);
}

}  // namespace permllm::cuda
