// CUTLASS' mainloop for sparse products on sm_90, with activations permuted inside.
//
// TMA brings weights, metadata and activations as it does for the mainloop that this one derives
// from; those who multiply permute a stage of activations in place (permute_stage.h) before they
// use it, while the tensor cores multiply the stage before.
#pragma once

#include "many_tokens_cutlass.h"
#include "permute_stage.h"

namespace permllm::cuda::sm90 {

constexpr int kPlaneBytes = kRowMultiple * kInputMultiple / 8;  // metadata of a stage

// A thread's metadata of 64 rows x 128 inputs are 16 bytes of a stage, a word for every 32 inputs:
// where they begin.
PERMLLM_HOST_DEVICE constexpr int metadata_of_thread(int thread, int row) {
  return static_cast<int>(
      metadata_byte(row + thread / 32 * 16 + thread % 32 / 4, thread % 2 * 16, kRowMultiple));
}

// Whether CUTLASS places activations as permute_stage takes for granted, and metadata within a
// stage as format.h does within a plane; and whether a thread's metadata, of which wgmma wants 32
// bits at a time, are where metadata_of_thread says. Sizes are powers of two and places exclusive
// ors of those of the binary digits of token, row, input and thread.
template <class Mainloop>
constexpr bool has_our_stages() {
  constexpr int kTokens = cute::size<1>(typename Mainloop::TileShape{});
  const decltype(cute::as_position_independent_swizzle_layout(
      typename Mainloop::SmemLayoutB{})) activations{};
  const auto metadata = typename Mainloop::SmemLayoutE{}.layout_b();
  const auto same = [&](int m, int input) {
    const int token = m % kTokens;
    return 2 * activations(token, input, 0) == activation_byte<kTokens>(token, input) &&
           metadata(m, input - input % 8, 0) ==
               8 * metadata_byte(m, input - input % 8, kRowMultiple);
  };
  const typename Mainloop::TiledMma::Atom::Traits::ELayout fragment{};  // of 64 rows x 32 inputs
  const auto same_fragment = [&](int thread, int i) {
    const int place = fragment(thread, i);
    return metadata(place % 64, place / 64, 0) == 8 * metadata_of_thread(thread, 0) + i;
  };
  for (int i = 1; i < kRowMultiple; i *= 2) {
    if (!same(i, 0) || !same(0, i) || !same_fragment(i, 0) || !same_fragment(0, i % 32)) {
      return false;
    }
  }
  return same(kRowMultiple - 1, kInputMultiple - 1) && same_fragment(kPermutingThreads - 1, 31) &&
         2 * activations(0, 0, 1) == kStageBytes<kTokens> && metadata(0, 0, 1) == 8 * kPlaneBytes;
}

template <class Mainloop>
struct PermutedMainloop : Mainloop {
  using typename Mainloop::MainloopPipeline;
  using typename Mainloop::PipelineState;
  using typename Mainloop::TensorStorage;
  using typename Mainloop::TiledMma;
  static constexpr int kTokens = cute::size<1>(typename Mainloop::TileShape{});
  static_assert(cute::size(TiledMma{}) == kPermutingThreads, "one warp group has a tile");
  static_assert(has_our_stages<Mainloop>());

  struct Arguments : Mainloop::Arguments {
    const uint8_t* permutation;  // [padded inputs]
  };
  struct Params : Mainloop::Params {
    const uint8_t* permutation;
  };

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape& problem,
                                                  const Arguments& arguments, void* workspace) {
    return {Mainloop::to_underlying_arguments(problem, arguments, workspace),
            arguments.permutation};
  }

  // `steps` of 128 inputs, the first of them the first of the layer: no scheduler that splits the
  // inputs over blocks can be used.
  template <class Sums>
  CUTLASS_DEVICE void mma(MainloopPipeline pipeline, PipelineState stage, Sums& sums, int steps,
                          int thread, TensorStorage& shared, const Params& params) {
    using namespace cute;
    TiledMma tiled_mma;
    const auto slice = tiled_mma.get_slice(0);  // operands are descriptors, the same for everyone
    const auto weights = slice.make_fragment_A(slice.partition_A(
        make_tensor(make_smem_ptr(shared.smem_A.begin()), typename Mainloop::SmemLayoutA{})));
    const auto inputs = slice.make_fragment_B(slice.partition_B(
        make_tensor(make_smem_ptr(shared.smem_B.begin()), typename Mainloop::SmemLayoutB{})));
    auto metadata = make_tensor<uint32_t>(
        make_shape(_1{}, size<1>(weights), size<2>(weights)));  // (_, 64 rows, 32 inputs)

    wait_for_previous_kernel();  // who loads has waited too; the permutation is read here
    const int lane = thread % 32;
    uint32_t places = load_places(params.permutation, 0, lane);
    const auto permute = [&](const PipelineState& filled, int step) {
      // Asked for before the stage is waited for: they come from the cache, or from memory.
      const uint32_t next = step + 1 < steps ? load_places(params.permutation, step + 1, lane) : 0;
      pipeline.consumer_wait(filled, pipeline.consumer_try_wait(filled));
      fence_compiler();  // which may move loads before CUTLASS' wait: its asm clobbers no memory
      permute_stage<kTokens>(
          reinterpret_cast<unsigned char*>(&shared.smem_B) + filled.index() * kStageBytes<kTokens>,
          places, thread);
      places = next;
    };

    permute(stage, 0);
    tiled_mma.accumulate_ = GMMA::ScaleOut::Zero;
    for (int step = 0; step < steps; ++step) {
      meet();  // all have permuted their tokens
      load_metadata(metadata, shared, stage.index(), thread);
      warpgroup_fence_operand(sums);
      warpgroup_arrive();
      CUTLASS_PRAGMA_UNROLL
      for (int k = 0; k < size<2>(weights); ++k) {
        cute::gemm(tiled_mma, make_zip_tensor(weights(_, _, k, stage.index()), metadata(_, _, k)),
                   inputs(_, _, k, stage.index()), sums);
        tiled_mma.accumulate_ = GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
      const PipelineState multiplied = stage;
      ++stage;
      if (step + 1 < steps) permute(stage, step + 1);
      warpgroup_wait<0>();
      warpgroup_fence_operand(metadata);  // whose registers wgmma has read until here
      warpgroup_fence_operand(sums);
      pipeline.consumer_release(multiplied);
    }
  }

 private:
  // One barrier does for both warp groups of a block: the kernel lets them multiply in turns.
  static CUTLASS_DEVICE void meet() {
    cutlass::arch::NamedBarrier::sync(kPermutingThreads, uint32_t{0});
  }

  template <class Metadata>
  static CUTLASS_DEVICE void load_metadata(Metadata& metadata, TensorStorage& shared, int stage,
                                           int thread) {
    const auto* plane =
        reinterpret_cast<const unsigned char*>(&shared.smem_E) + stage * kPlaneBytes;
    CUTLASS_PRAGMA_UNROLL
    for (int m = 0; m < cute::size<1>(metadata); ++m) {
      const auto words =
          *reinterpret_cast<const uint4*>(plane + metadata_of_thread(thread, 64 * m));
      metadata(0, m, 0) = words.x;
      metadata(0, m, 1) = words.y;
      metadata(0, m, 2) = words.z;
      metadata(0, m, 3) = words.w;
    }
  }
};

}  // namespace permllm::cuda::sm90
