#include "kernels.h"
#include "launch.h"
#include "mma_linear.h"

namespace permllm::cuda {
namespace {

template <class Element, class Value, int kTokenTiles>
__global__ void __launch_bounds__(kMmaThreads)
    mma_kernel(LinearArguments arguments, MmaPlan plan, float* partial) {
  extern __shared__ __align__(1024) unsigned char shared[];
  mma_body<Element, Value, kTokenTiles>(arguments, plan, partial, shared);
}

template <class Element>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(LinearArguments arguments, const float* partial, int splits) {
  reduce_body<Element>(arguments, partial, splits);
}

template <class Element, class Value>
auto kernel_of(const MmaPlan& plan) {
  switch (plan.token_tiles) {
    case 1:
      return mma_kernel<Element, Value, 1>;
    case 2:
      return mma_kernel<Element, Value, 2>;
    case 4:
      return mma_kernel<Element, Value, 4>;
    default:
      return mma_kernel<Element, Value, 8>;
  }
}

template <class Element>
int run(const LinearArguments& arguments, const MmaPlan& plan, float* partial, void* stream) {
  const auto kernel =
      arguments.int8 ? kernel_of<Element, int8_t>(plan) : kernel_of<Element, uint16_t>(plan);
  const int error = launch(kernel, mma_grid(arguments, plan), kMmaThreads, plan.shared_bytes,
                           stream, arguments, plan, partial);
  if (error != cudaSuccess || plan.splits == 1) return error;
  return launch(reduce_kernel<Element>, reduce_grid(arguments), kReduceThreads, 0, stream,
                arguments, partial, plan.splits);
}

}  // namespace

int mma_linear(const LinearArguments& arguments, const MmaPlan& plan, float* partial,
               void* stream) {
  return arguments.element == ElementType::kFloat16
             ? run<Float16>(arguments, plan, partial, stream)
             : run<BFloat16>(arguments, plan, partial, stream);
}

}  // namespace permllm::cuda
