// The kernel for few tokens: bound by the bytes of the weight.
//
// A block multiplies its rows by all inputs of its split, 128 inputs a step. Weights stream through
// a ring of stages in shared memory, each byte read once. Activations stream through a ring of
// their own, a stage shorter, and are permuted in their stage once they have arrived: multiplying
// knows nothing of the permutation. Weights do not depend on the previous kernel, so their first
// stages are requested before it ends.
#pragma once

#include "epilogue.h"
#include "few_tokens_plan.h"
#include "permute_stage.h"
#include "warp_tile.h"

namespace permllm::cuda {

// Tokens, plan.token_tiles * 8 to a block, rows and splits. Blocks that read the same weight for
// other tokens follow each other, so that the cache still has it.
inline Grid few_tokens_grid(const LinearArguments& arguments, const FewTokensPlan& plan) {
  return {static_cast<unsigned>(token_blocks(arguments, plan)),
          static_cast<unsigned>((arguments.padded_rows + plan.rows - 1) / plan.rows),
          static_cast<unsigned>(plan.splits)};
}

// What a thread brings of the activations of a step: the same 8 inputs of one token in every eight.
// Of the tokens that its own warp permutes, so that no other has to wait for them. Inputs past the
// last are zeros; what lies in a stage for tokens past the last goes into no result.
template <int kTokens>
struct ActivationCopies {
  static constexpr int kRowBytes = kSwizzleTokens * kSwizzledBytes;  // from one to the next

  const uint16_t* x;  // of the first token, at the first input of the layer
  int64_t row_stride;
  int inputs;       // of the layer
  int first_token;  // of the block's
  int tokens;       // of the block, at most kTokens
  int first_input;  // of the 128 of a step

  PERMLLM_DEVICE ActivationCopies(const LinearArguments& arguments, int token)
      : row_stride(kSwizzleTokens * arguments.x_stride), inputs(arguments.inputs) {
    const int lane = threadIdx.x % 32;
    first_token = static_cast<int>(threadIdx.x) / 32 * 2 + lane / 16;
    first_input = lane % 16 * 8;
    tokens = arguments.tokens - token < kTokens ? arguments.tokens - token : kTokens;
    x = static_cast<const uint16_t*>(arguments.x) + (token + first_token) * arguments.x_stride;
  }

  PERMLLM_DEVICE bool is_valid(int64_t input) const { return input + first_input < inputs; }
  PERMLLM_DEVICE unsigned char* target(unsigned char* stage) const {
    return stage + activation_byte<kTokens>(first_token, first_input);
  }

  // Starts the copies of the step that begins at `input`. A loop, for the sake of registers.
  PERMLLM_DEVICE void start(unsigned char* stage, int64_t input) const {
    const bool valid = is_valid(input);
    const uint16_t* source = valid ? x + input + first_input : x;
    unsigned char* row = target(stage);
    PERMLLM_LOOP
    for (int token = first_token; token < tokens; token += kSwizzleTokens) {
      copy_async_16(row, source, valid);
      source += row_stride;
      row += kRowBytes;
    }
  }

  // Brings `kSteps` steps through registers: all their loads are on their way together.
  template <int kSteps, class Stage, class Input>
  PERMLLM_DEVICE void load(const Stage& stage_of, const Input& input_of) const {
    constexpr int kRows = kTokens / kSwizzleTokens;
    const auto is_there = [&](int r) { return first_token + r * kSwizzleTokens < tokens; };
    uint4 units[kSteps][kRows] = {};
    PERMLLM_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const uint16_t* source = x + input_of(step) + first_input;
      PERMLLM_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (is_there(r) && is_valid(input_of(step))) {
          units[step][r] = *reinterpret_cast<const uint4*>(source + r * row_stride);
        }
      }
    }
    PERMLLM_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      PERMLLM_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (!is_there(r)) continue;
        *reinterpret_cast<uint4*>(target(stage_of(step)) + r * kRowBytes) = units[step][r];
      }
    }
  }
};

// Called by few_tokens_threads(kRows) threads, for the rows from `row` on, the inputs of a split
// and the tokens from `token` on. Of the rows of the last block, some may not be there.
template <class Element, class Value, int kTokenTiles, int kRows = kRowMultiple>
PERMLLM_DEVICE void few_tokens_body(const LinearArguments& arguments, const FewTokensPlan& plan,
                                    float* partial, int row, int split, int token,
                                    unsigned char* shared) {
  using Stage = WeightStage<Value, kRows>;
  constexpr int kThreads = few_tokens_threads(kRows);
  constexpr int kTokens = 8 * kTokenTiles;
  constexpr int kStages = few_tokens_stages(kTokenTiles);
  constexpr int kInputStages = kStages - 1;
  // With many tokens a warp multiplies half of the rows by half of the tokens: shared memory then
  // delivers the activations to two warps in place of four.
  constexpr int kRowTiles = few_tokens_row_tiles(kTokenTiles);
  constexpr int kWarpsOfRows = kRows / kWarpRows / kRowTiles;
  static_assert(kThreads / 32 == kWarpsOfRows * kRowTiles && kThreads >= kPermutingThreads);
  const int lane = threadIdx.x % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int first_row = warp % kWarpsOfRows * kRowTiles * kWarpRows;
  const int first_token = warp / kWarpsOfRows * (kTokens / kRowTiles);
  const bool has_rows =
      kRowMultiple % kRows == 0 || row + first_row < arguments.padded_rows;  // this warp
  // Four warps bring and permute activations, of as many as there are.
  const bool brings = kThreads == kPermutingThreads || warp < kPermutingThreads / 32;
  const int first_step = split * plan.steps_per_split;
  const int all_steps = arguments.padded_inputs / kStepInputs;
  const int steps =
      all_steps - first_step < plan.steps_per_split ? all_steps - first_step : plan.steps_per_split;
  unsigned char* const weights = shared + kInputStages * kStageBytes<kTokens>;

  const auto input_of = [&](int step) { return int64_t{first_step + step} * kStepInputs; };
  const auto inputs_of = [&](int step) {
    return shared + step % kInputStages * kStageBytes<kTokens>;
  };
  const auto fetch_weights = [&](int step) {
    if (step < steps) {
      Stage::template copy<kThreads>(weights + step % kStages * Stage::kBytes, arguments.values,
                                     arguments.metadata, arguments.padded_rows,
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
  wait_for_previous_kernel();
  allow_next_kernel();
  const ActivationCopies<kTokens> activations(arguments, token);
  const bool permutes = brings && arguments.permutation != nullptr;
  uint32_t places = permutes ? load_places(arguments.permutation, first_step, lane) : 0;
  if (brings) activations.template load<kInputStages - 1>(inputs_of, input_of);

  WarpTile<Element, Value, kRowTiles, kTokenTiles / kRowTiles, kRows> tile;
  tile.clear();
  for (int step = 0; step < steps; ++step) {
    wait_copies<2 * kInputStages - 3>();
    if (permutes) {
      sync_warp();  // the tokens of this warp have arrived
      permute_tokens<kTokens>(inputs_of(step), places, threadIdx.x, activations.tokens,
                              [](unsigned char* target, uint32_t word) {
                                *reinterpret_cast<uint32_t*>(target) = word;
                              });
    }
    sync_block();  // stages of this step are written; those of the step before were read
    if (const int next = step + kInputStages - 1; brings && next < steps) {
      activations.start(inputs_of(next), input_of(next));
    }
    commit_copies();
    fetch_weights(step + kStages - 1);
    if (permutes && step + 1 < steps) {
      places = load_places(arguments.permutation, first_step + step + 1, lane);
    }
    if (!has_rows) continue;
    const unsigned char* inputs = inputs_of(step);
    tile.add_step(weights + step % kStages * Stage::kBytes, first_row, lane, [&](int t, int unit) {
      return inputs + activation_byte<kTokens>(first_token + t, unit * 8);
    });
  }

  sync_block();  // the stages are free: the copies of every step have arrived
  auto* sums = reinterpret_cast<float*>(shared);
  tile.store(sums, kTilePitch<kRows>, first_row, first_token, lane);
  sync_block();
  const int64_t plane = int64_t{arguments.tokens} * arguments.padded_rows;
  write_tile<Element, kTokens, kThreads, kRows>(
      arguments, sums, partial == nullptr ? nullptr : partial + split * plane, row, token);
}

}  // namespace permllm::cuda
