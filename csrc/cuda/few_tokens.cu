#include "few_tokens.h"
#include "kernels.h"
#include "launch.h"

namespace permllm::cuda {
namespace {

template <class Element, class Value, int kTokenTiles>
__global__ void __launch_bounds__(kFewThreads)
    few_tokens_kernel(LinearArguments arguments, FewTokensPlan plan, float* partial) {
  extern __shared__ __align__(1024) unsigned char shared[];
  few_tokens_body<Element, Value, kTokenTiles>(arguments, plan, partial, shared);
}

template <class Element>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(LinearArguments arguments, const float* partial, int splits) {
  reduce_body<Element>(arguments, partial, splits);
}

template <class Element, class Value>
auto kernel_of(int token_tiles) {
  switch (token_tiles) {
    case 1:
      return few_tokens_kernel<Element, Value, 1>;
    case 2:
      return few_tokens_kernel<Element, Value, 2>;
    case 4:
      return few_tokens_kernel<Element, Value, 4>;
    default:
      return few_tokens_kernel<Element, Value, 8>;
  }
}

template <class Element>
int run(const LinearArguments& arguments, const FewTokensPlan& plan, float* partial,
        const Device& device, void* stream) {
  const auto kernel = arguments.int8 ? kernel_of<Element, int8_t>(plan.token_tiles)
                                     : kernel_of<Element, uint16_t>(plan.token_tiles);
  const int error = launch(kernel, few_tokens_grid(arguments, plan), kFewThreads, plan.shared_bytes,
                           device, stream, arguments, plan, partial);
  if (error != cudaSuccess || plan.splits == 1) return error;
  return launch(reduce_kernel<Element>, reduce_grid(arguments), kReduceThreads, 0, device, stream,
                arguments, partial, plan.splits);
}

}  // namespace

int few_tokens(const LinearArguments& arguments, const FewTokensPlan& plan, float* partial,
               const Device& device, void* stream) {
  return arguments.element == ElementType::kFloat16
             ? run<Float16>(arguments, plan, partial, device, stream)
             : run<BFloat16>(arguments, plan, partial, device, stream);
}

}  // namespace permllm::cuda
