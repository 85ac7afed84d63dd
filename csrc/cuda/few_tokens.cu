#include "few_tokens.h"
#include "kernels.h"
#include "launch.h"

namespace permllm::cuda {
namespace {

// All registers that a block may have: they do not keep a second one of 128 rows from its
// processor.
template <class Element, class Value, int kTokenTiles, int kRows>
__global__ void __launch_bounds__(few_tokens_threads(kRows), kRows > kRowMultiple)
    few_tokens_kernel(LinearArguments arguments, FewTokensPlan plan, float* partial) {
  extern __shared__ __align__(1024) unsigned char shared[];
  few_tokens_body<Element, Value, kTokenTiles, kRows>(arguments, plan, partial, blockIdx.y * kRows,
                                                      blockIdx.z, blockIdx.x * (8 * kTokenTiles),
                                                      shared);
}

template <class Element>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(LinearArguments arguments, const float* partial, int splits) {
  reduce_body<Element>(arguments, partial, splits);
}

template <class Element, class Value>
auto kernel_of(const FewTokensPlan& plan) {
  switch (plan.token_tiles) {
    case 1:
      return few_tokens_kernel<Element, Value, 1, 128>;
    case 2:
      return few_tokens_kernel<Element, Value, 2, 128>;
    case 4:
      return few_tokens_kernel<Element, Value, 4, 128>;
    default:
      return plan.rows == 128   ? few_tokens_kernel<Element, Value, 8, 128>
             : plan.rows == 192 ? few_tokens_kernel<Element, Value, 8, 192>
                                : few_tokens_kernel<Element, Value, 8, 256>;
  }
}

template <class Element>
int run(const LinearArguments& arguments, const FewTokensPlan& plan, float* partial,
        const Device& device, void* stream) {
  const auto kernel =
      arguments.int8 ? kernel_of<Element, int8_t>(plan) : kernel_of<Element, uint16_t>(plan);
  const int error = launch(kernel, few_tokens_grid(arguments, plan), few_tokens_threads(plan.rows),
                           plan.shared_bytes, device, stream, arguments, plan, partial);
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
