// The kernel for many tokens on sm_90: CUTLASS' sparse GEMM, wgmma fed by TMA.
//
// y^T [rows][tokens] = W [rows][inputs] x^T [inputs][tokens]: only the first operand of a sparse
// product may be sparse, and y^T in columns is y in rows. The bias has an entry per row of y^T. The
// activations are permuted already (permute.h).
//
// Included by one file for each type: a configuration takes nvcc most of a minute.
#pragma once

#include <cuda_runtime_api.h>

// clang-format off
#include "cutlass/cutlass.h"
#include "cute/tensor.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
// clang-format on

#include "kernel_choice.h"

// Without it, kernels that are launched to overlap with the previous one do not wait for it.
#ifndef CUTLASS_ENABLE_GDC_FOR_SM90
#error "compile with -DCUTLASS_ENABLE_GDC_FOR_SM90=1"
#endif

namespace permllm::cuda::sm90 {

using cute::_0;
using cute::_1;
using cute::_128;
using cute::_2;
using cute::_256;
using cute::_64;

template <class T, class Tile, class Cluster, class MainloopSchedule, class EpilogueSchedule>
struct Configuration {
  static constexpr int kAligned = 128 / cutlass::sizeof_bits<T>::value;
  using Columns = cutlass::layout::ColumnMajor;
  using Bias =
      cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, T, float, cute::Stride<_1, _0, int64_t>>;
  using AddBias = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::plus, T, float,
                                             cutlass::FloatRoundStyle::round_to_nearest>,
      cutlass::epilogue::fusion::Sm90AccFetch, Bias>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Columns, kAligned, T,
      Columns, kAligned, EpilogueSchedule, AddBias>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, T, cutlass::layout::RowMajor,
      2 * kAligned, T, Columns, kAligned, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      MainloopSchedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop,
                                                      Epilogue, void>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  // Our metadata (format.h) are those of 16-bit types and tiles of 128 inputs or more.
  using Expected = cutlass::Sm90GemmSparseConfig<cute::sparse_elem<2, T>, cute::GMMA::Major::K,
                                                 cute::sparse_elem<8, uint8_t>, _128>;
  static_assert(cute::is_same_v<typename Mainloop::SparseConfig, Expected>);

  // Returns a cudaError_t.
  static int run(const LinearArguments& arguments, const Device& device, int index, void* stream) {
    const typename Kernel::ProblemShape problem{arguments.rows, arguments.tokens, arguments.inputs,
                                                1};
    // The weight is stored with padding, which CUTLASS never reads into a result: rows past the
    // last are not stored, and inputs past the last are zeros in x.
    const typename Kernel::ProblemShape stored{arguments.padded_rows, arguments.tokens,
                                               arguments.padded_inputs, 1};
    const cute::Stride<int64_t, _1, int64_t> x_stride{arguments.x_stride, {}, 0};
    const cute::Stride<_1, int64_t, int64_t> y_stride{{}, arguments.rows, 0};
    cutlass::KernelHardwareInfo hardware;
    hardware.device_id = index;
    hardware.sm_count = device.processors;
    const typename Gemm::Arguments gemm_arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        problem,
        {static_cast<const T*>(arguments.values), Expected::fill_layoutA(stored),
         static_cast<const T*>(arguments.x), x_stride, arguments.metadata,
         Expected::fill_layoutE(stored)},
        {{{}, {static_cast<const T*>(arguments.bias), T(0), {}}, {}},
         nullptr,
         y_stride,
         static_cast<T*>(arguments.y),
         y_stride},
        hardware};
    if (Gemm::get_workspace_size(gemm_arguments) != 0) return cudaErrorInvalidConfiguration;
    Gemm gemm;
    auto* cuda_stream = static_cast<cudaStream_t>(stream);
    if (gemm.initialize(gemm_arguments, nullptr, cuda_stream) != cutlass::Status::kSuccess) {
      return cudaErrorInvalidConfiguration;
    }
    const auto status = gemm.run(cuda_stream, nullptr, /*launch_with_pdl=*/true);
    if (status == cutlass::Status::kSuccess) return cudaSuccess;
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? cudaErrorLaunchFailure : error;
  }
};

// The tiles and clusters of kernel_choice.h.
using Pingpong = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using Cooperative = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using PingpongEpilogue = cutlass::epilogue::TmaWarpSpecialized;
using CooperativeEpilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;

template <class T>
using Small = Configuration<T, cute::Shape<_128, _64, _128>, cute::Shape<_1, _1, _1>, Pingpong,
                            PingpongEpilogue>;
template <class T>
using Medium = Configuration<T, cute::Shape<_128, _128, _128>, cute::Shape<_2, _1, _1>, Pingpong,
                             PingpongEpilogue>;
template <class T>
using Large = Configuration<T, cute::Shape<_128, _256, _128>, cute::Shape<_2, _1, _1>, Cooperative,
                            CooperativeEpilogue>;

template <class T>
int run(const LinearArguments& arguments, const Device& device, int index, void* stream) {
  switch (sm90_tile_tokens(arguments, device)) {
    case 256:
      return Large<T>::run(arguments, device, index, stream);
    case 128:
      return Medium<T>::run(arguments, device, index, stream);
    default:
      return Small<T>::run(arguments, device, index, stream);
  }
}

}  // namespace permllm::cuda::sm90
