// How the few-token kernel cuts its work.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "format.h"
#include "throughput.h"

namespace permllm::cuda {

constexpr int kFewTokens = 64;    // most tokens of a block
constexpr int kMostResident = 2;  // blocks on a processor that are counted on
constexpr int kLargestSplits = 16;
constexpr int kLeastStepsPerSplit = 4;  // 512 inputs

// Rows of a block. More than 32 tokens can have wider ones, which permute and bring activations
// less often, and share the rows of some layers more evenly among the processors.
constexpr int kFewRows[] = {128, 192, 256};

struct FewTokensPlan {
  int rows;             // per block
  int token_tiles;      // of 8 tokens, per block: 1, 2, 4 or 8
  int steps_per_split;  // of 128 inputs
  int splits;
  int shared_bytes;
};

// A warp has 32 rows and all tokens of the block, or 64 rows and half of them.
PERMLLM_HOST_DEVICE constexpr int few_tokens_threads(int rows) { return rows; }

// Stages of weights in flight; of activations there is one less. 64 tokens get fewer, so that two
// blocks of 128 rows share a processor of sm_90, and one fits a processor of sm_89 and sm_120.
PERMLLM_HOST_DEVICE constexpr int few_tokens_stages(int token_tiles) {
  return token_tiles == 8 ? 3 : 4;
}

// Of 32 rows, that a warp multiplies: 64 tokens are halved between the warps instead.
PERMLLM_HOST_DEVICE constexpr int few_tokens_row_tiles(int token_tiles) {
  return token_tiles == 8 ? 2 : 1;
}

// Of `rows` x 128 inputs.
constexpr int weight_stage_bytes(int rows, bool int8) { return rows * ((int8 ? 64 : 128) + 16); }

constexpr int few_tokens_shared_bytes(int rows, int token_tiles, bool int8) {
  const int stages = few_tokens_stages(token_tiles);
  return stages * weight_stage_bytes(rows, int8) +
         (stages - 1) * token_tiles * 8 * kInputMultiple * 2;
}

// Blocks of `rows`: fills the GPU once with blocks of equal length where the inputs allow it.
inline FewTokensPlan plan_few_tokens(const LinearArguments& arguments, const Device& device,
                                     int rows) {
  FewTokensPlan plan{};
  plan.rows = rows;
  plan.token_tiles = 1;
  while (plan.token_tiles * 8 < arguments.tokens && plan.token_tiles * 8 < kFewTokens) {
    plan.token_tiles *= 2;
  }
  const int tokens = plan.token_tiles * 8;
  const int steps = arguments.padded_inputs / kInputMultiple;
  plan.shared_bytes = few_tokens_shared_bytes(rows, plan.token_tiles, arguments.int8);
  // A second wide block would find no room on some GPUs: none is counted on.
  const int resident =
      std::clamp(device.shared_bytes_per_processor / (plan.shared_bytes + (1 << 10)), 1,
                 rows == kRowMultiple ? kMostResident : 1);
  const int slots = device.processors * resident;
  const int blocks =
      (arguments.padded_rows + rows - 1) / rows * ((arguments.tokens + tokens - 1) / tokens);
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

// What a product takes: the bytes of the weight from memory, or shared memory of the processor that
// has most blocks, whichever is more. A step writes weights and activations of the tokens that
// there are, and reads both for the product, activations of the whole tile; permuting reads 2 bytes
// a lane, and writes once more. Partial sums are written and read in the cache, by a kernel more.
inline int64_t few_tokens_clocks(const LinearArguments& arguments, const Device& device,
                                 const FewTokensPlan& plan) {
  const int row_tiles = few_tokens_row_tiles(plan.token_tiles);
  const int token_clocks = 2 * kInputMultiple / kSharedBytesPerClock;
  const int stage = weight_stage_bytes(plan.rows, arguments.int8);
  const int step = stage / kSharedBytesPerClock * (1 + row_tiles) +
                   plan.token_tiles * 8 * token_clocks * (plan.rows / 32 / row_tiles) +
                   arguments.tokens * token_clocks * (arguments.permutation ? 1 + 2 + 1 : 1);
  const int64_t blocks = (arguments.padded_rows + plan.rows - 1) / plan.rows * plan.splits;
  const int64_t most_blocks = (blocks + device.processors - 1) / device.processors;
  const int64_t bytes = int64_t{weight_stage_bytes(arguments.padded_rows, arguments.int8)} *
                        (arguments.padded_inputs / kInputMultiple);
  const int64_t product =
      std::max(most_blocks * plan.steps_per_split * step,
               bytes / (device.processors * memory_bytes_per_clock(device.capability)));
  if (plan.splits == 1) return product;
  const int64_t sums = int64_t{4} * plan.splits * arguments.tokens * arguments.padded_rows;
  return product + kPassClocks + 2 * sums / (device.processors * kCacheBytesPerClock);
}

// The rows of a block that take the fewest clocks, with the permutation if there is one. Of equals
// the narrowest: more blocks have more of the weight in flight.
inline FewTokensPlan plan_few_tokens(const LinearArguments& arguments, const Device& device) {
  FewTokensPlan best = plan_few_tokens(arguments, device, kRowMultiple);
  if (best.token_tiles * 8 < kFewTokens) return best;
  int64_t fewest = few_tokens_clocks(arguments, device, best);
  for (const int rows : kFewRows) {
    const FewTokensPlan plan = plan_few_tokens(arguments, device, rows);
    if (plan.shared_bytes > device.shared_bytes_per_block) continue;
    const int64_t clocks = few_tokens_clocks(arguments, device, plan);
    if (clocks < fewest) {
      fewest = clocks;
      best = plan;
    }
  }
  return best;
}

}  // namespace permllm::cuda
