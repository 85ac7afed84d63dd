// How the few-token kernel cuts its work.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "format.h"

namespace permllm::cuda {

constexpr int kFewThreads = 128;
constexpr int kFewTokens = 64;    // most tokens of a block
constexpr int kMostResident = 2;  // blocks on a processor that are counted on
constexpr int kLargestSplits = 16;
constexpr int kLeastStepsPerSplit = 4;  // 512 inputs

struct FewTokensPlan {
  int token_tiles;      // of 8 tokens, per block: 1, 2, 4 or 8
  int steps_per_split;  // of 128 inputs
  int splits;
  int shared_bytes;
};

// Stages of weights in flight; of activations there is one less. 64 tokens get fewer, so that two
// blocks share a processor of sm_90, and one fits a processor of sm_89 and sm_120.
PERMLLM_HOST_DEVICE constexpr int few_tokens_stages(int token_tiles) {
  return token_tiles == 8 ? 3 : 4;
}

// Of 32 rows, that a warp multiplies: 64 tokens are halved between the warps instead.
PERMLLM_HOST_DEVICE constexpr int few_tokens_row_tiles(int token_tiles) {
  return token_tiles == 8 ? 2 : 1;
}

constexpr int weight_stage_bytes(bool int8) { return kRowMultiple * ((int8 ? 64 : 128) + 16); }

constexpr int few_tokens_shared_bytes(int token_tiles, bool int8) {
  const int stages = few_tokens_stages(token_tiles);
  return stages * weight_stage_bytes(int8) + (stages - 1) * token_tiles * 8 * kInputMultiple * 2;
}

// Fills the GPU once with blocks of equal length where the inputs allow it.
inline FewTokensPlan plan_few_tokens(const LinearArguments& arguments, const Device& device) {
  FewTokensPlan plan{};
  plan.token_tiles = 1;
  while (plan.token_tiles * 8 < arguments.tokens && plan.token_tiles * 8 < kFewTokens) {
    plan.token_tiles *= 2;
  }
  const int tokens = plan.token_tiles * 8;
  const int steps = arguments.padded_inputs / kInputMultiple;
  plan.shared_bytes = few_tokens_shared_bytes(plan.token_tiles, arguments.int8);
  const int resident = std::clamp(
      device.shared_bytes_per_processor / (plan.shared_bytes + (1 << 10)), 1, kMostResident);
  const int slots = device.processors * resident;
  const int blocks =
      arguments.padded_rows / kRowMultiple * ((arguments.tokens + tokens - 1) / tokens);
  // A block per processor keeps the memory busy; only narrower layers are split over their inputs.
  const int most =
      blocks >= device.processors ? 1 : std::clamp(steps / kLeastStepsPerSplit, 1, kLargestSplits);
  int best_length = 1 << 30;  // in steps, of the blocks that one slot runs in turn
  for (int splits = 1; splits <= most; ++splits) {
    const int per_split = (steps + splits - 1) / splits;
    if ((steps + per_split - 1) / per_split != splits) continue;  // the last would have nothing
    const int rounds = (blocks * splits + slots - 1) / slots;
    // Beginning and ending a block costs about two steps, adding partial sums one more.
    const int length = rounds * (per_split + 2) + (splits > 1 ? 1 : 0);
    if (length < best_length) {
      best_length = length;
      plan.splits = splits;
      plan.steps_per_split = per_split;
    }
  }
  return plan;
}

}  // namespace permllm::cuda
