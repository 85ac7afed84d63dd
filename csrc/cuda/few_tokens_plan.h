// How the few-token kernel cuts its work.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "format.h"

namespace permllm::cuda {

constexpr int kFewThreads = 128;
constexpr int kFewStages = 4;
constexpr int kFewTokens = 64;         // most tokens of a block
constexpr int kPanelBytes = 34 << 10;  // aimed at: two blocks then share a processor of sm_90
constexpr int kLargestSplits = 16;
constexpr int kLeastStepsPerSplit = 4;  // 512 inputs

struct FewTokensPlan {
  int token_tiles;      // of 8 tokens, per block: 1, 2, 4 or 8
  int steps_per_split;  // of 128 inputs
  int splits;
  int panel_steps;  // activations of so many steps lie in shared memory at a time
  int shared_bytes;
};

inline int stage_bytes(bool int8) { return kRowMultiple * ((int8 ? 64 : 128) + 16); }

// Fills the GPU once with blocks of equal length where the inputs allow it.
inline FewTokensPlan plan_few_tokens(const LinearArguments& arguments, const Device& device) {
  FewTokensPlan plan{};
  plan.token_tiles = 1;
  while (plan.token_tiles * 8 < arguments.tokens && plan.token_tiles * 8 < kFewTokens) {
    plan.token_tiles *= 2;
  }
  const int tokens = plan.token_tiles * 8;
  const int steps = arguments.padded_inputs / kInputMultiple;
  const int stages = kFewStages * stage_bytes(arguments.int8);
  const int panel = std::min(kPanelBytes, device.shared_bytes_per_block - stages);
  const int panel_steps = std::max(1, (panel / (2 * tokens) - 8) / kInputMultiple);

  const auto shared_bytes = [&](int steps_of_panel) {
    const int panel_bytes = 2 * tokens * (steps_of_panel * kInputMultiple + 8);
    const int tile_bytes = tokens * (kRowMultiple + 4) * 4;  // of sums, in the place of the stages
    return std::max(stages + panel_bytes, tile_bytes);
  };
  const int estimate = shared_bytes(std::min(panel_steps, steps));
  const int resident = std::clamp(device.shared_bytes_per_processor / (estimate + (1 << 10)), 1, 4);
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
  plan.panel_steps = std::min(panel_steps, plan.steps_per_split);
  plan.shared_bytes = shared_bytes(plan.panel_steps);
  return plan;
}

}  // namespace permllm::cuda
