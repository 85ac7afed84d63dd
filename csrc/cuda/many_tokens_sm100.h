// The kernel for many tokens on sm_100: CUTLASS' sparse GEMM, tcgen05.mma.sp fed by TMA, sums in
// tensor memory. Two processors multiply a tile of 256 rows together.
#pragma once

#include "device.h"
#include "many_tokens_cutlass.h"

namespace permllm::cuda::sm100 {

using cute::_1;
using cute::_128;
using cute::_2;
using cute::_256;
using cute::_64;

// The bias, read after the previous kernel has ended. On sm_90 the warps that add it have
// multiplied before, and so waited for loads which waited; here they are warps of their own, which
// read the bias while others load, and CUTLASS has them wait for nothing.
template <class Bias>
struct BiasAfterWait : Bias {
  using Bias::Bias;

  template <bool kOfSource, class... Types>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Types...>& arguments) {
    wait_for_previous_kernel();
    return Bias::template get_consumer_store_callbacks<kOfSource>(arguments);
  }
};

// The tiles of kernel_choice.h: half of the rows for each of the two processors.
template <class T, class Tokens>
using Gemm =
    SparseGemm<cutlass::arch::Sm100, T, cute::Shape<_256, Tokens, _128>, cute::Shape<_2, _1, _1>,
               cutlass::gemm::KernelSparseTmaWarpSpecialized2SmSm100,
               cutlass::epilogue::TmaWarpSpecialized2Sm,
               BiasAfterWait<RowBias<T, cute::Shape<_128, Tokens, _128>>>>;

template <class T>
int run(const LinearArguments& arguments, int tile, const Device& device, void* stream) {
  switch (tile) {
    case 256:
      return Gemm<T, _256>::run(arguments, device, stream);
    case 128:
      return Gemm<T, _128>::run(arguments, device, stream);
    default:
      return Gemm<T, _64>::run(arguments, device, stream);
  }
}

}  // namespace permllm::cuda::sm100
