#include "kernels.h"
#include "launch.h"
#include "permute.h"

namespace permllm::cuda {
namespace {

template <class Bits>
__global__ void __launch_bounds__(kPermuteThreads) permute_kernel(PermuteArguments arguments) {
  __shared__ __align__(16) unsigned char shared[kPermuteSharedBytes];
  permute_body<Bits>(arguments, shared);
}

}  // namespace

int permute(const PermuteArguments& arguments, int element_bytes, const Device& device,
            void* stream) {
  const auto kernel = element_bytes == 1   ? permute_kernel<uint8_t>
                      : element_bytes == 2 ? permute_kernel<uint16_t>
                                           : permute_kernel<uint32_t>;
  return launch(kernel, permute_grid(arguments, element_bytes), kPermuteThreads, 0, device, stream,
                arguments);
}

}  // namespace permllm::cuda
