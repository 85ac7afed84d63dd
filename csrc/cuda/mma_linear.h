// The product by mma.sp.m16n8k32: of few tokens on every GPU, where it is bound by the bytes of the
// weight, and of any number of tokens where there is no GEMM of CUTLASS.
//
// A block multiplies 128 rows by all inputs of its split, 128 inputs a step. Weights stream through
// a ring of stages in shared memory, each byte read once. Activations stream through a ring of
// their own, a stage shorter, and are permuted in their stage once they have arrived: multiplying
// knows nothing of the permutation.
#pragma once

#include "activation_stage.h"
#include "epilogue.h"
#include "mma_plan.h"
#include "warp_tile.h"

namespace permllm::cuda {

// Tokens, plan.token_tiles * 8 to a block, rows and splits. Blocks that read the same weight for
// other tokens follow each other, so that the cache still has it.
inline Grid mma_grid(const LinearArguments& arguments, const MmaPlan& plan) {
  return {static_cast<unsigned>(token_blocks(arguments, plan)),
          static_cast<unsigned>(arguments.padded_rows / kStepRows),
          static_cast<unsigned>(plan.splits)};
}

// Called by kMmaThreads threads of the grid above. `partial` is null where there is one split.
template <class Element, class Value, int kTokenTiles>
PERMLLM_DEVICE void mma_body(const LinearArguments& arguments, const MmaPlan& plan, float* partial,
                             unsigned char* shared) {
  using Weights = WeightStage<Value>;
  constexpr int kTokens = 8 * kTokenTiles;
  constexpr int kStages = mma_stages(kTokenTiles);
  constexpr int kInputStages = kStages - 1;
  // With many tokens a warp multiplies half of the rows by half of the tokens: shared memory then
  // delivers the activations to two warps in place of four.
  constexpr int kRowTiles = kTokenTiles == 8 ? 2 : 1;
  constexpr int kWarpsOfRows = kStepRows / kWarpRows / kRowTiles;
  const int lane = threadIdx.x % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int first_row = warp % kWarpsOfRows * kRowTiles * kWarpRows;
  const int first_token = warp / kWarpsOfRows * (kTokens / kRowTiles);
  const int row = static_cast<int>(blockIdx.y) * kStepRows;
  const int token = static_cast<int>(blockIdx.x) * kTokens;
  const int split = static_cast<int>(blockIdx.z);
  const int first_step = split * plan.steps_per_split;
  const int all_steps = arguments.padded_inputs / kStepInputs;
  const int steps =
      all_steps - first_step < plan.steps_per_split ? all_steps - first_step : plan.steps_per_split;
  unsigned char* const weights = shared + kInputStages * kActivationBytes<kTokens>;

  const auto input_of = [&](int step) { return int64_t{first_step + step} * kStepInputs; };
  const auto weights_of = [&](int step) { return weights + step % kStages * Weights::kBytes; };
  const auto inputs_of = [&](int step) {
    return shared + step % kInputStages * kActivationBytes<kTokens>;
  };
  const auto fetch_weights = [&](int step) {
    if (step < steps) {
      Weights::copy(weights_of(step), arguments.values, arguments.metadata, arguments.padded_rows,
                    arguments.padded_inputs, row, input_of(step));
    }
    commit_copies();
  };
  // Groups of copies arrive in order: weights of a step, activations of that step, weights of the
  // next. The first activations do not come by copies, which would be behind all weights that are
  // requested before them: their groups are empty.
  PERMLLM_UNROLL
  for (int step = 0; step < kStages - 1; ++step) {
    if (step > 0) commit_copies();
    fetch_weights(step);
  }
  const ActivationCopies<kTokens> activations(arguments, token);
  const bool permutes = arguments.permutation != nullptr;
  uint32_t places = permutes ? load_places(arguments.permutation, first_step, lane) : 0;
  activations.template load<kInputStages - 1>(inputs_of, input_of);

  WarpTile<Element, Value, kRowTiles, kTokenTiles / kRowTiles> tile;
  tile.clear();
  for (int step = 0; step < steps; ++step) {
    wait_copies<2 * kInputStages - 3>();
    if (permutes) {
      sync_warp();  // the tokens of this warp have arrived
      permute_tokens<kTokens>(inputs_of(step), places, activations.tokens);
    }
    sync_block();  // stages of this step are written; those of the step before were read
    if (const int next = step + kInputStages - 1; next < steps) {
      activations.start(inputs_of(next), input_of(next));
    }
    commit_copies();
    fetch_weights(step + kStages - 1);
    if (permutes && step + 1 < steps) {
      places = load_places(arguments.permutation, first_step + step + 1, lane);
    }
    const unsigned char* inputs = inputs_of(step);
    tile.add_step(weights_of(step), first_row, lane, [&](int t, int unit) {
      return inputs + activation_byte<kTokens>(first_token + t, unit * 8);
    });
  }

  sync_block();  // the stages are free: the copies of every step have arrived
  auto* sums = reinterpret_cast<float*>(shared);
  tile.store(sums, kTilePitch, first_row, first_token, lane);
  sync_block();
  const int64_t plane = int64_t{arguments.tokens} * arguments.padded_rows;
  write_tile<Element, kTokens>(arguments, sums,
                               partial == nullptr ? nullptr : partial + split * plane, row, token);
}

}  // namespace permllm::cuda
