#include "expert_linear.h"
#include "expert_routing.h"
#include "expert_rows.h"
#include "kernels.h"
#include "launch.h"

namespace permllm::cuda {
namespace {

__global__ void __launch_bounds__(kRouteThreads)
    route_kernel(ExpertsArguments arguments, ExpertsPlan plan) {
  __shared__ __align__(16) unsigned char shared[kRouteSharedBytes];
  route_body(arguments, plan, shared);
}

__global__ void __launch_bounds__(kRowThreads) gather_kernel(ExpertsArguments arguments) {
  __shared__ __align__(16) unsigned char shared[kRowSharedBytes];
  gather_body(arguments, shared);
}

template <class Element>
__global__ void __launch_bounds__(kRowThreads) gate_kernel(ExpertsArguments arguments) {
  __shared__ __align__(16) unsigned char shared[kRowSharedBytes];
  gate_body<Element>(arguments, shared);
}

template <class Element>
__global__ void __launch_bounds__(kRowThreads) combine_kernel(ExpertsArguments arguments) {
  combine_body<Element>(arguments);
}

template <class Element, class Value, int kTokenTiles>
__global__ void __launch_bounds__(few_tokens_threads(kRowMultiple))
    few_pairs_kernel(StackedLinear linear, const ExpertBlock* blocks, FewTokensPlan plan,
                     const void* x, void* y) {
  extern __shared__ __align__(1024) unsigned char shared[];
  few_pairs_body<Element, Value, kTokenTiles>(linear, blocks, plan, x, y, shared);
}

template <class Element, class Value>
__global__ void __launch_bounds__(kManyThreads<kManyPairs>)
    many_pairs_kernel(StackedLinear linear, const ExpertBlock* blocks, const void* x, void* y) {
  extern __shared__ __align__(1024) unsigned char shared[];
  many_pairs_body<Element, Value>(linear, blocks, x, y, shared);
}

template <class Element, class Value>
auto kernel_of(const FewTokensPlan& plan) {
  switch (plan.token_tiles) {
    case 1:
      return few_pairs_kernel<Element, Value, 1>;
    case 2:
      return few_pairs_kernel<Element, Value, 2>;
    case 4:
      return few_pairs_kernel<Element, Value, 4>;
    default:
      return few_pairs_kernel<Element, Value, 8>;
  }
}

template <class Element>
int run(const ExpertsArguments& a, const ExpertsPlan& plan, const Device& device, void* stream) {
  const auto multiply = [&](const StackedLinear& linear, const FewTokensPlan& few, const void* x,
                            void* y) {
    const Grid grid = expert_linear_grid(linear, plan);
    if (plan.many()) {
      const auto kernel =
          linear.int8 ? many_pairs_kernel<Element, int8_t> : many_pairs_kernel<Element, uint16_t>;
      return launch(kernel, grid, kManyThreads<kManyPairs>, many_pairs_shared_bytes(linear), device,
                    stream, linear, a.tables.blocks, x, y);
    }
    const auto kernel =
        linear.int8 ? kernel_of<Element, int8_t>(few) : kernel_of<Element, uint16_t>(few);
    return launch(kernel, grid, few_tokens_threads(few.rows), few.shared_bytes, device, stream,
                  linear, a.tables.blocks, few, x, y);
  };
  const auto rows = [&](auto kernel, int count, int columns) {
    return launch(kernel, row_grid(count, columns), kRowThreads, 0, device, stream, a);
  };
  int error = launch(route_kernel, Grid{}, kRouteThreads, 0, device, stream, a, plan);
  if (error == cudaSuccess) error = rows(gather_kernel, plan.pairs, a.gate_up.inputs);
  if (error == cudaSuccess) error = multiply(a.gate_up, plan.gate_up, a.gathered, a.gate_ups);
  if (error == cudaSuccess) error = rows(gate_kernel<Element>, plan.pairs, a.down.inputs);
  if (error == cudaSuccess) error = multiply(a.down, plan.down, a.gated, a.outputs);
  if (error == cudaSuccess) error = rows(combine_kernel<Element>, a.tokens, a.down.rows);
  return error;
}

}  // namespace

int multiply_experts(const ExpertsArguments& arguments, const ExpertsPlan& plan,
                     const Device& device, void* stream) {
  return arguments.element == ElementType::kFloat16
             ? run<Float16>(arguments, plan, device, stream)
             : run<BFloat16>(arguments, plan, device, stream);
}

}  // namespace permllm::cuda
