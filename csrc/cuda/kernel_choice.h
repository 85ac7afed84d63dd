// Which kernel multiplies, and in which tiles: from shapes, types and the GPU alone, so that a
// launch can be captured in a graph. No header of CUDA or CUTLASS: tested on the host.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "few_tokens_plan.h"
#include "format.h"

namespace permllm::cuda {

enum class LinearKernel { kFewTokens, kManyTokensMma, kManyTokensSm90 };

// `has_sm90`: many_tokens_sm90 is in this build. All but kFewTokens take permuted activations.
inline LinearKernel choose_kernel(const LinearArguments& arguments, const Device& device,
                                  bool has_sm90) {
  if (arguments.tokens <= kFewTokens) return LinearKernel::kFewTokens;
  // TMA writes y 16 bytes at a time; CUTLASS has no product of int8 weights and 16-bit activations.
  if (has_sm90 && device.capability == 90 && !arguments.int8 && arguments.rows % 8 == 0) {
    return LinearKernel::kManyTokensSm90;
  }
  return LinearKernel::kManyTokensMma;
}

// A tile of many_tokens_sm90.h: 128 rows by `tokens`, `cluster` of them above each other sharing
// the activations that they load.
struct Sm90Tile {
  int tokens;
  int cluster;
  int shared_clocks;  // that shared memory takes for 128 inputs: reads of wgmma, writes of TMA
};

// Shared memory binds before the tensor cores do (docs/cuda.md, a model: 128 bytes a clock).
constexpr Sm90Tile kSm90Tiles[] = {{256, 2, 1168 + 656}, {128, 2, 656 + 400}, {64, 1, 400 + 272}};
// Of the second-level cache, for each processor when all read: 5.5 TB/s at 1.75 GHz of an H100.
constexpr int kCacheBytesPerClock = 24;

// The tile that takes the fewest clocks: rounds over the processors times the length of a tile, or
// the bytes that all tiles read from the cache. A tile that is partly empty costs as much as a full
// one. Of equals the larger one: it reads the weight less often.
inline int sm90_tile_tokens(const LinearArguments& arguments, const Device& device) {
  int64_t fewest = INT64_MAX;
  int best = 0;
  for (const Sm90Tile& tile : kSm90Tiles) {
    const int64_t rows = round_up(arguments.padded_rows / kRowMultiple, tile.cluster);
    const int64_t tiles = rows * ((arguments.tokens + tile.tokens - 1) / tile.tokens);
    const int64_t rounds = (tiles + device.processors - 1) / device.processors;
    const int64_t weight_bytes = kRowMultiple * kInputMultiple * 9 / 8;
    const int64_t bytes = weight_bytes + 2 * kInputMultiple * tile.tokens / tile.cluster;
    const int64_t clocks =
        std::max(rounds * tile.shared_clocks,
                 tiles * bytes / (int64_t{device.processors} * kCacheBytesPerClock));
    if (clocks < fewest) {
      fewest = clocks;
      best = tile.tokens;
    }
  }
  return best;
}

}  // namespace permllm::cuda
