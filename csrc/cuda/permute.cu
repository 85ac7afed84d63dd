#include "kernels.h"
#include "launch.h"
#include "permute.h"

namespace permllm::cuda {
namespace {

__global__ void __launch_bounds__(kPermuteThreads) permute_kernel(PermuteArguments arguments) {
  __shared__ __align__(16) unsigned char shared[kPermuteSharedBytes];
  permute_body(arguments, shared);
}

}  // namespace

int permute(const PermuteArguments& arguments, void* stream) {
  return launch(permute_kernel, permute_grid(arguments), kPermuteThreads, 0, stream, arguments);
}

}  // namespace permllm::cuda
