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

inline int64_t weight_bytes(const LinearArguments& arguments) {
  return int64_t{weight_stage_bytes(arguments.padded_rows, arguments.int8)} *
         (arguments.padded_inputs / kInputMultiple);
}

constexpr int few_tokens_shared_bytes(int rows, int token_tiles, bool int8) {
  const int stages = few_tokens_stages(token_tiles);
  return stages * weight_stage_bytes(rows, int8) +
         (stages - 1) * token_tiles * 8 * kInputMultiple * 2;
}

// Blocks for all tokens.
inline int token_blocks(const LinearArguments& arguments, const FewTokensPlan& plan) {
  return (arguments.tokens + plan.token_tiles * 8 - 1) / (plan.token_tiles * 8);
}

// That the bytes of the weight take to come from memory, once.
inline int64_t memory_clocks(const LinearArguments& arguments, const Device& device) {
  return weight_bytes(arguments) / (device.processors * memory_bytes_per_clock(device.capability));
}

// What a product takes: the bytes of the weight from memory, or shared memory of the processor that
// has most blocks, whichever is more. A step writes weights and activations of the tokens that
// there are, and reads both for the product, activations of the whole tile; permuting reads 2 bytes
// a lane, and writes once more. Not counted is what it reads of tokens that are not there, where a
// tile has more than 8. Partial sums are written and read in the cache, by a kernel more.
//
// More tokens than those of a block read the weight again, from the cache: what all blocks read
// there counts then, as it does for the kernels that these clocks are compared with.
inline int64_t few_tokens_clocks(const LinearArguments& arguments, const Device& device,
                                 const FewTokensPlan& plan) {
  const int row_tiles = few_tokens_row_tiles(plan.token_tiles);
  const int token_clocks = 2 * kInputMultiple / kSharedBytesPerClock;
  const int tokens = std::min(arguments.tokens, kFewTokens);  // of a block
  const int stage = weight_stage_bytes(plan.rows, arguments.int8);
  const int step = stage / kSharedBytesPerClock * (1 + row_tiles) +
                   plan.token_tiles * 8 * token_clocks * (plan.rows / 32 / row_tiles) +
                   tokens * token_clocks * (arguments.permutation ? 1 + 2 + 1 : 1);
  const int64_t row_blocks = (arguments.padded_rows + plan.rows - 1) / plan.rows;
  const int64_t blocks = row_blocks * plan.splits * token_blocks(arguments, plan);
  const int64_t most_blocks = (blocks + device.processors - 1) / device.processors;
  const int64_t cache_bytes = int64_t{device.processors} * kCacheBytesPerClock;
  int64_t product =
      std::max(most_blocks * plan.steps_per_split * step, memory_clocks(arguments, device));
  if (arguments.tokens > kFewTokens) {
    const int64_t bytes = weight_bytes(arguments) * token_blocks(arguments, plan) +
                          row_blocks * arguments.padded_inputs * arguments.tokens * 2;
    product = std::max(product, bytes / cache_bytes);
  }
  if (plan.splits == 1) return product;
  const int64_t sums = int64_t{4} * plan.splits * arguments.tokens * arguments.padded_rows;
  return product + kPassClocks + 2 * sums / cache_bytes;
}

// Blocks of `rows`: fills the GPU once with blocks of equal length where the inputs allow it. More
// tokens than those of a block have so many partial sums that these decide too: of their splits,
// those that take the fewest clocks.
inline FewTokensPlan plan_few_tokens(const LinearArguments& arguments, const Device& device,
                                     int rows) {
  FewTokensPlan plan{};
  plan.rows = rows;
  plan.token_tiles = 1;
  while (plan.token_tiles * 8 < arguments.tokens && plan.token_tiles * 8 < kFewTokens) {
    plan.token_tiles *= 2;
  }
  const int steps = arguments.padded_inputs / kInputMultiple;
  plan.shared_bytes = few_tokens_shared_bytes(rows, plan.token_tiles, arguments.int8);
  // A second wide block would find no room on some GPUs: none is counted on.
  const int resident =
      std::clamp(device.shared_bytes_per_processor / (plan.shared_bytes + (1 << 10)), 1,
                 rows == kRowMultiple ? kMostResident : 1);
  const int64_t slots = device.processors * resident;
  const int64_t blocks =
      int64_t{(arguments.padded_rows + rows - 1) / rows} * token_blocks(arguments, plan);
  // A block per processor keeps the memory busy; only narrower layers are split over their inputs.
  const int most =
      blocks >= device.processors ? 1 : std::clamp(steps / kLeastStepsPerSplit, 1, kLargestSplits);
  FewTokensPlan best{};
  int64_t fewest = INT64_MAX;  // steps of the blocks that one slot runs in turn, or clocks
  for (int splits = 1; splits <= most; ++splits) {
    plan.splits = splits;
    plan.steps_per_split = (steps + splits - 1) / splits;
    if ((steps + plan.steps_per_split - 1) / plan.steps_per_split != splits) {
      continue;  // the last would have nothing
    }
    const int64_t rounds = (blocks * splits + slots - 1) / slots;
    // Beginning and ending a block costs about two steps, adding partial sums one more.
    const int64_t length = arguments.tokens > kFewTokens
                               ? few_tokens_clocks(arguments, device, plan)
                               : rounds * (plan.steps_per_split + 2) + (splits > 1 ? 1 : 0);
    if (length < fewest) {
      fewest = length;
      best = plan;
    }
  }
  return best;
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
