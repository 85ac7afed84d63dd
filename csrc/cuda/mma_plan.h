// Which kernel multiplies, and how the one of mma.sp cuts its work: from shapes, types and the GPU
// alone, so that a launch can be captured in a graph. No header of CUDA: tested on the host.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "format.h"

namespace permllm::cuda {

constexpr int kMostBlockTokens = 64;  // of a block of mma.sp
constexpr int kMostResident = 2;      // blocks on a processor that are counted on
constexpr int kLargestSplits = 16;
constexpr int kLeastStepsPerSplit = 4;  // 512 inputs

// Whether CUTLASS' GEMM multiplies, where this build has it: more tokens than a block of mma.sp
// has, and no int8 values, whose product with 16-bit activations CUTLASS lacks. TMA writes y 16
// bytes at a time.
inline bool takes_gemm_sm90(const LinearArguments& arguments, const Device& device) {
  return device.capability == 90 && arguments.tokens > kMostBlockTokens && !arguments.int8 &&
         arguments.rows % 8 == 0;
}

// Whether a pass permutes the activations in front of the product. Otherwise every block of mma.sp
// permutes its tokens in shared memory, which hides behind the bytes of the weight if they are few.
inline bool takes_a_pass(const LinearArguments& arguments) {
  return arguments.permutation != nullptr && arguments.tokens > kMostBlockTokens;
}

struct MmaPlan {
  int token_tiles;      // of 8 tokens, per block: 1, 2, 4 or 8
  int steps_per_split;  // of 128 inputs
  int splits;
  int shared_bytes;
};

// Stages of weights in flight; of activations there is one less. 64 tokens get fewer, so that two
// blocks share a processor of sm_90, and one fits a processor of sm_89 and sm_120.
PERMLLM_HOST_DEVICE constexpr int mma_stages(int token_tiles) { return token_tiles == 8 ? 3 : 4; }

// Of 128 rows x 128 inputs.
constexpr int weight_stage_bytes(bool int8) { return kRowMultiple * ((int8 ? 64 : 128) + 16); }

constexpr int mma_shared_bytes(int token_tiles, bool int8) {
  const int stages = mma_stages(token_tiles);
  return stages * weight_stage_bytes(int8) + (stages - 1) * token_tiles * 8 * kInputMultiple * 2;
}

// Blocks for all tokens.
inline int token_blocks(const LinearArguments& arguments, const MmaPlan& plan) {
  return (arguments.tokens + plan.token_tiles * 8 - 1) / (plan.token_tiles * 8);
}

// Fills the GPU once with blocks of equal length where the inputs allow it: only layers too narrow
// for a block on every processor are split over their inputs.
inline MmaPlan plan_mma(const LinearArguments& arguments, const Device& device) {
  MmaPlan plan{};
  plan.token_tiles = 1;
  while (plan.token_tiles * 8 < std::min(arguments.tokens, kMostBlockTokens)) plan.token_tiles *= 2;
  plan.shared_bytes = mma_shared_bytes(plan.token_tiles, arguments.int8);
  const int steps = arguments.padded_inputs / kInputMultiple;
  const int resident = std::clamp(
      device.shared_bytes_per_processor / (plan.shared_bytes + (1 << 10)), 1, kMostResident);
  const int64_t slots = device.processors * resident;
  const int64_t blocks =
      int64_t{arguments.padded_rows / kRowMultiple} * token_blocks(arguments, plan);
  const int most =
      blocks >= device.processors ? 1 : std::clamp(steps / kLeastStepsPerSplit, 1, kLargestSplits);
  MmaPlan best{};
  int64_t fewest = INT64_MAX;  // steps of the blocks that one slot runs in turn
  for (int splits = 1; splits <= most; ++splits) {
    plan.splits = splits;
    plan.steps_per_split = (steps + splits - 1) / splits;
    if ((steps + plan.steps_per_split - 1) / plan.steps_per_split != splits) {
      continue;  // the last would have nothing
    }
    const int64_t rounds = (blocks * splits + slots - 1) / slots;
    // Beginning and ending a block costs about two steps, adding partial sums one more.
    const int64_t length = rounds * (plan.steps_per_split + 2) + (splits > 1 ? 1 : 0);
    if (length < fewest) {
      fewest = length;
      best = plan;
    }
  }
  return best;
}

}  // namespace permllm::cuda
