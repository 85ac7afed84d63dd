// The kernel for few tokens: bound by the bytes of the weight.
//
// A block multiplies 128 rows by all inputs of its split. Weights stream through shared memory,
// each byte read once. The activations of the block lie in a panel, permuted while they are written
// to it, whole or, where they are too many, part by part: multiplying knows nothing of the
// permutation. Weights do not depend on the previous
// kernel, so their first stages are requested before it ends.
#pragma once

#include "epilogue.h"
#include "few_tokens_plan.h"
#include "warp_tile.h"

namespace permllm::cuda {

inline Grid few_tokens_grid(const LinearArguments& arguments, const FewTokensPlan& plan) {
  const int tokens = plan.token_tiles * 8;
  return {static_cast<unsigned>(arguments.padded_rows / kStepRows),
          static_cast<unsigned>(plan.splits),
          static_cast<unsigned>((arguments.tokens + tokens - 1) / tokens)};
}

// Elements between tokens of the panel: 16 bytes more than a multiple of 128, so that the eight
// rows that ldmatrix reads lie in different banks.
PERMLLM_HOST_DEVICE constexpr int panel_pitch(int panel_inputs) { return panel_inputs + 8; }

// Writes panel[token][input] = x[token0 + token][permuted input], zeros past the last token or
// input.
template <int kTokens>
PERMLLM_DEVICE void fill_panel(const LinearArguments& arguments, uint16_t* panel, int pitch,
                               int token0, int64_t first_input, int count) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  for (int i = lane * 8; i < count; i += 32 * 8) {
    const int64_t input = first_input + i;
    const bool valid_input = input < arguments.inputs;
    uint2 places = {};
    if (valid_input && arguments.permutation != nullptr) {
      places = *reinterpret_cast<const uint2*>(arguments.permutation + input);
    }
    for (int token = warp; token < kTokens; token += kFewThreads / 32) {
      const uint16_t* x = static_cast<const uint16_t*>(arguments.x) +
                          static_cast<int64_t>(token0 + token) * arguments.x_stride;
      alignas(16) uint16_t values[8] = {};
      if (valid_input && token0 + token < arguments.tokens) {
        if (arguments.permutation == nullptr) {
          *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(x + input);
        } else {
          const uint16_t* block = x + input / kPermutationBlock * kPermutationBlock;
          PERMLLM_UNROLL
          for (int j = 0; j < 8; ++j) {
            const uint32_t four = j < 4 ? places.x : places.y;
            values[j] = block[four >> (8 * (j % 4)) & (kPermutationBlock - 1)];
          }
        }
      }
      *reinterpret_cast<uint4*>(panel + token * pitch + i) = *reinterpret_cast<uint4*>(values);
    }
  }
}

template <class Element, class Value, int kTokenTiles>
PERMLLM_DEVICE void few_tokens_body(const LinearArguments& arguments, const FewTokensPlan& plan,
                                    float* partial, unsigned char* shared) {
  using Stage = WeightStage<Value>;
  constexpr int kTokens = 8 * kTokenTiles;
  const int lane = threadIdx.x % 32;
  const int first_row = static_cast<int>(threadIdx.x) / 32 * kWarpRows;
  const int row = blockIdx.x * kStepRows;
  const int split = blockIdx.y;
  const int token = blockIdx.z * kTokens;
  const int first_step = split * plan.steps_per_split;
  const int all_steps = arguments.padded_inputs / kStepInputs;
  const int steps =
      all_steps - first_step < plan.steps_per_split ? all_steps - first_step : plan.steps_per_split;

  auto fetch = [&](int step) {
    if (step < steps) {
      Stage::template copy<kFewThreads>(shared + step % kFewStages * Stage::kBytes,
                                        arguments.values, arguments.metadata, arguments.padded_rows,
                                        arguments.padded_inputs, row,
                                        int64_t{first_step + step} * kStepInputs);
    }
    commit_copies();
  };
  PERMLLM_UNROLL
  for (int step = 0; step < kFewStages - 1; ++step) fetch(step);
  wait_for_previous_kernel();
  allow_next_kernel();

  auto* panel = reinterpret_cast<uint16_t*>(shared + kFewStages * Stage::kBytes);
  const int pitch = panel_pitch(plan.panel_steps * kStepInputs);
  WarpTile<Element, Value, 1, kTokenTiles> tile;
  tile.clear();
  for (int panel_step = 0; panel_step < steps; panel_step += plan.panel_steps) {
    const int count = steps - panel_step < plan.panel_steps ? steps - panel_step : plan.panel_steps;
    if (panel_step > 0) sync_block();  // every warp has read the previous panel
    fill_panel<kTokens>(arguments, panel, pitch, token,
                        int64_t{first_step + panel_step} * kStepInputs, count * kStepInputs);
    for (int i = 0; i < count; ++i) {
      const int step = panel_step + i;
      wait_copies<kFewStages - 2>();
      sync_block();  // the stage and the panel are written; the stage before was read
      fetch(step + kFewStages - 1);
      const uint16_t* inputs = panel + i * kStepInputs;
      tile.add_step(shared + step % kFewStages * Stage::kBytes, first_row, lane,
                    [&](int t, int unit) { return inputs + t * pitch + unit * 8; });
    }
  }

  sync_block();  // the stages are free: the copies of every step have arrived
  auto* sums = reinterpret_cast<float*>(shared);
  tile.store(sums, kTilePitch, first_row, 0, lane);
  sync_block();
  const int64_t plane = int64_t{arguments.tokens} * arguments.padded_rows;
  write_tile<Element, kTokens, kFewThreads>(
      arguments, sums, partial == nullptr ? nullptr : partial + split * plane, row, token);
}

}  // namespace permllm::cuda
