// The kernel for many tokens where there is none of CUTLASS: sm_80 to sm_89, sm_120, builds without
// it, and 8-bit weights everywhere. Activations are permuted already (permute.h) and stream as
// weights do.
//
// A block multiplies 128 rows by kTokens tokens, a warp 64 rows by 32 tokens.
#pragma once

#include "epilogue.h"
#include "many_tokens_plan.h"
#include "warp_tile.h"

namespace permllm::cuda {

// Warps of a block: two over the rows, one per 32 tokens.
template <int kTokens>
constexpr int kManyThreads = 2 * kTokens / 32 * 32;

// Activations of one step: [kTokens][128 inputs], rows that ldmatrix reads together in different
// banks.
template <int kTokens>
struct ActivationStage {
  static constexpr int kUnitsPerToken = kStepInputs * 2 / kUnit;
  static constexpr int kBytes = kTokens * kUnitsPerToken * kUnit;

  static PERMLLM_HOST_DEVICE constexpr int offset(int token, int unit) {
    return (token * kUnitsPerToken + (unit ^ (token % 8))) * kUnit;
  }

  static PERMLLM_DEVICE void copy(unsigned char* stage, const LinearArguments& arguments, int token,
                                  int64_t input) {
    const auto* x = static_cast<const uint16_t*>(arguments.x);
    PERMLLM_UNROLL
    for (int i = 0; i < kTokens * kUnitsPerToken / kManyThreads<kTokens>; ++i) {
      const int index = threadIdx.x + i * kManyThreads<kTokens>;
      const int t = index / kUnitsPerToken;
      const int unit = index % kUnitsPerToken;
      const bool valid = token + t < arguments.tokens && input + unit * 8 < arguments.inputs;
      const uint16_t* source =
          valid ? x + static_cast<int64_t>(token + t) * arguments.x_stride + input + unit * 8 : x;
      copy_async_16(stage + offset(t, unit), source, valid);
    }
  }
};

template <int kTokens>
Grid many_tokens_grid(const LinearArguments& arguments) {
  return {static_cast<unsigned>((arguments.tokens + kTokens - 1) / kTokens),
          static_cast<unsigned>(arguments.padded_rows / kStepRows)};
}

// The rows from `row` on, of the tokens from `token` on.
template <class Element, class Value, int kTokens>
PERMLLM_DEVICE void many_tokens_body(const LinearArguments& arguments, int row, int token,
                                     unsigned char* shared) {
  using Weights = WeightStage<Value>;
  using Activations = ActivationStage<kTokens>;
  constexpr bool kInt8 = sizeof(Value) == 1;
  constexpr int kStages = many_tokens_stages(kTokens, kInt8);
  constexpr int kStageBytes = Weights::kBytes + Activations::kBytes;
  constexpr int kSharedBytes = many_tokens_shared_bytes(kTokens, kInt8);
  static_assert(kStages * kStageBytes == kSharedBytes);
  static_assert(kTokens * kTilePitch<> * int{sizeof(float)} <= kSharedBytes, "the tile of sums");
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int first_row = warp % 2 * 64;
  const int first_token = warp / 2 * 32;
  const int steps = arguments.padded_inputs / kStepInputs;

  auto stage_of = [&](int step) { return shared + step % kStages * kStageBytes; };
  auto fetch_weights = [&](int step) {
    if (step < steps) {
      Weights::template copy<kManyThreads<kTokens>>(
          stage_of(step), arguments.values, arguments.metadata, arguments.padded_rows,
          arguments.padded_inputs, row, int64_t{step} * kStepInputs);
    }
  };
  auto fetch_activations = [&](int step) {
    if (step < steps) {
      Activations::copy(stage_of(step) + Weights::kBytes, arguments, token,
                        int64_t{step} * kStepInputs);
    }
    commit_copies();
  };
  PERMLLM_UNROLL
  for (int step = 0; step < kStages - 1; ++step) fetch_weights(step);
  wait_for_previous_kernel();
  allow_next_kernel();
  PERMLLM_UNROLL
  for (int step = 0; step < kStages - 1; ++step) fetch_activations(step);

  WarpTile<Element, Value, 2, 4> tile;
  tile.clear();
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    sync_block();  // the stage is written; the stage before was read
    fetch_weights(step + kStages - 1);
    fetch_activations(step + kStages - 1);
    const unsigned char* stage = stage_of(step);
    const unsigned char* inputs = stage + Weights::kBytes;
    tile.add_step(stage, first_row, lane, [&](int t, int unit) {
      return inputs + Activations::offset(first_token + t, unit);
    });
  }

  sync_block();  // the stages are free: the copies of every step have arrived
  auto* sums = reinterpret_cast<float*>(shared);
  tile.store(sums, kTilePitch<>, first_row, first_token, lane);
  sync_block();
  write_tile<Element, kTokens, kManyThreads<kTokens>>(arguments, sums, nullptr, row, token);
}

}  // namespace permllm::cuda
