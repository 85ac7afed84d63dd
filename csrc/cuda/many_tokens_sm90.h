// The kernel for many tokens on sm_90: CUTLASS' sparse GEMM, wgmma fed by TMA.
#pragma once

#include "many_tokens_cutlass.h"

namespace permllm::cuda::sm90 {

using cute::_1;
using cute::_128;
using cute::_2;
using cute::_256;
using cute::_64;

template <class T, class Tile, class Cluster, class MainloopSchedule, class EpilogueSchedule,
          template <class> class Adapt = AsItIs>
using Gemm = SparseGemm<cutlass::arch::Sm90, T, Tile, Cluster, MainloopSchedule, EpilogueSchedule,
                        RowBias<T, Tile>, Adapt>;

// The tiles and clusters of kernel_choice.h.
using Pingpong = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using Cooperative = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using PingpongEpilogue = cutlass::epilogue::TmaWarpSpecialized;
using CooperativeEpilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;

template <class T>
using Small =
    Gemm<T, cute::Shape<_128, _64, _128>, cute::Shape<_1, _1, _1>, Pingpong, PingpongEpilogue>;
template <class T>
using Medium =
    Gemm<T, cute::Shape<_128, _128, _128>, cute::Shape<_2, _1, _1>, Pingpong, PingpongEpilogue>;
template <class T>
using Large = Gemm<T, cute::Shape<_128, _256, _128>, cute::Shape<_2, _1, _1>, Cooperative,
                   CooperativeEpilogue>;

template <class T>
int run(const LinearArguments& arguments, int tile, const Device& device, void* stream) {
  switch (tile) {
    case 256:
      return Large<T>::run(arguments, device, stream);
    case 128:
      return Medium<T>::run(arguments, device, stream);
    default:
      return Small<T>::run(arguments, device, stream);
  }
}

}  // namespace permllm::cuda::sm90
