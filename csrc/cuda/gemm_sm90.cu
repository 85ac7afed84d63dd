// The product of many tokens on sm_90: CUTLASS 3's sparse GEMM, wgmma fed by TMA.
//
// y^T [rows][tokens] = W [rows][inputs] x^T [inputs][tokens]: only the first operand of a sparse
// product may be sparse, and y^T in columns is y in rows. The bias has an entry per row of y^T. The
// activations are permuted already (permute.h).
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

#include "format.h"
#include "kernels.h"
#include "launch.h"

namespace permllm::cuda {
namespace {

// Whether a configuration of CUTLASS places values and metadata as format.h does, at 16 bits. All
// sizes within are powers of two, so that places add up over the binary digits of row and input.
template <class SparseConfig>
constexpr bool reads_our_format() {
  constexpr int kRows = 2 * kRowMultiple;
  constexpr int kInputs = 2 * kInputMultiple;
  const auto size = cute::make_shape(kRows, 1, kInputs, 1);
  const auto values = SparseConfig::fill_layoutA(size);
  const auto metadata = SparseConfig::fill_layoutE(size);
  const auto same = [&](int m, int k) {
    const auto place = cute::make_coord(m, k, 0);
    return values(place) == int64_t{m} * kInputs + k &&  // with the inputs that are not kept
           metadata(place) == 8 * metadata_byte(m, k, kRows);
  };
  for (int m = 1; m < kRows; m *= 2) {
    if (!same(m, 0)) return false;
  }
  for (int k = 8; k < kInputs; k *= 2) {
    if (!same(0, k)) return false;
  }
  return same(kRows - 1, kInputs - 8);
}

template <class T>
struct SparseGemm {
  // Tiles above each other share the activations that they load.
  using Tile = cute::Shape<cute::_128, cute::_128, cute::_128>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  static constexpr int kAligned = 128 / cutlass::sizeof_bits<T>::value;
  using Columns = cutlass::layout::ColumnMajor;
  // Of each row of y^T; zero where there is none.
  using Bias =
      cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, T, float,
                                                  cute::Stride<cute::_1, cute::_0, int64_t>>;
  using AddBias = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::plus, T, float,
                                             cutlass::FloatRoundStyle::round_to_nearest>,
      cutlass::epilogue::fusion::Sm90AccFetch, Bias>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Columns, kAligned, T,
      Columns, kAligned, cutlass::epilogue::TmaWarpSpecialized, AddBias>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, T, cutlass::layout::RowMajor,
      2 * kAligned, T, Columns, kAligned, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop,
                                                      Epilogue, void>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using SparseConfig = typename Mainloop::SparseConfig;
  static_assert(reads_our_format<SparseConfig>());

  // Returns a cudaError_t.
  static int run(const LinearArguments& arguments, const Device& device, void* stream) {
    const typename Kernel::ProblemShape problem{arguments.rows, arguments.tokens, arguments.inputs,
                                                1};
    // The weight is stored with padding, which CUTLASS never reads into a result: rows past the
    // last are not stored, and inputs past the last are zeros in x.
    const typename Kernel::ProblemShape stored{arguments.padded_rows, arguments.tokens,
                                               arguments.padded_inputs, 1};
    const cute::Stride<int64_t, cute::_1, int64_t> x_stride{arguments.x_stride, {}, 0};
    const cute::Stride<cute::_1, int64_t, int64_t> y_stride{{}, arguments.rows, 0};
    cutlass::KernelHardwareInfo hardware;
    hardware.device_id = device.index;
    hardware.sm_count = device.processors;
    const typename Gemm::Arguments gemm_arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        problem,
        {static_cast<const T*>(arguments.values), SparseConfig::fill_layoutA(stored),
         static_cast<const T*>(arguments.x), x_stride, arguments.metadata,
         SparseConfig::fill_layoutE(stored)},
        {{{}, {static_cast<const T*>(arguments.bias), T(0), {}}, {}},
         nullptr,
         y_stride,
         static_cast<T*>(arguments.y),
         y_stride},
        hardware};
    if (Gemm::get_workspace_size(gemm_arguments) != 0) return cudaErrorInvalidConfiguration;
    const int error = allow_shared_memory(
        reinterpret_cast<const void*>(cutlass::device_kernel<Kernel>), Kernel::SharedStorageSize);
    if (error != cudaSuccess) return error;
    // Not initialize(), which would do that again, and else only clears the workspace that there is
    // not.
    return launch_by_cutlass(device, [&] {
      typename Kernel::Params params = Kernel::to_underlying_arguments(gemm_arguments, nullptr);
      return Gemm::run(params, static_cast<cudaStream_t>(stream)) == cutlass::Status::kSuccess;
    });
  }
};

}  // namespace

int gemm_sm90(const LinearArguments& arguments, const Device& device, void* stream) {
  return arguments.element == ElementType::kFloat16
             ? SparseGemm<cutlass::half_t>::run(arguments, device, stream)
             : SparseGemm<cutlass::bfloat16_t>::run(arguments, device, stream);
}

}  // namespace permllm::cuda
