// Which kernel multiplies, and in which tiles: from shapes, types and the GPU alone, so that a
// launch can be captured in a graph. No header of CUDA or CUTLASS: tested on the host.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "few_tokens_plan.h"
#include "format.h"

namespace permllm::cuda {

enum class LinearKernel { kFewTokens, kManyTokensMma, kManyTokensSm90, kManyTokensSm100 };

// The kernels of CUTLASS that a build has, by the GPUs that they run on.
struct CutlassKernels {
  bool sm90;
  bool sm100;
  bool sm103;  // the one of sm_100, compiled for its family
};

// All but kFewTokens take permuted activations.
inline LinearKernel choose_kernel(const LinearArguments& arguments, const Device& device,
                                  const CutlassKernels& built) {
  if (arguments.tokens <= kFewTokens) return LinearKernel::kFewTokens;
  // TMA writes y 16 bytes at a time; CUTLASS has no product of int8 weights and 16-bit activations.
  if (arguments.int8 || arguments.rows % 8 != 0) return LinearKernel::kManyTokensMma;
  const int capability = device.capability;
  if (built.sm90 && capability == 90) return LinearKernel::kManyTokensSm90;
  if ((built.sm100 && capability == 100) || (built.sm103 && capability == 103)) {
    return LinearKernel::kManyTokensSm100;
  }
  return LinearKernel::kManyTokensMma;
}

// A tile of CUTLASS' kernels: 128 rows by `tokens`, `cluster` of them above each other sharing the
// activations that they load.
struct CutlassTile {
  int tokens;
  int cluster;
  int shared_clocks;  // that shared memory takes for 128 inputs: reads of products, writes of TMA
};

// Shared memory binds before the tensor cores do (docs/cuda.md, a model: 128 bytes a clock).
constexpr CutlassTile kSm90Tiles[] = {
    {256, 2, 1168 + 656}, {128, 2, 656 + 400}, {64, 1, 400 + 272}};
// Two processors multiply together: each reads its own rows, and half of the activations.
constexpr CutlassTile kSm100Tiles[] = {
    {256, 2, 400 + 400}, {128, 2, 272 + 272}, {64, 2, 208 + 208}};
// Of the second-level cache, for each processor when all read: 5.5 TB/s at 1.75 GHz of an H100.
// Taken to be the same on sm_100.
constexpr int kCacheBytesPerClock = 24;

// The tokens of the tile that takes the fewest clocks: rounds over the processors times the length
// of a tile, or the bytes that all tiles read from the cache. A tile that is partly empty costs as
// much as a full one. Of equals the first, which is larger: it reads the weight less often.
template <int kTiles>
int fastest_tile(const CutlassTile (&choices)[kTiles], const LinearArguments& arguments,
                 const Device& device) {
  int64_t fewest = INT64_MAX;
  int best = 0;
  for (const CutlassTile& tile : choices) {
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

inline int sm90_tile_tokens(const LinearArguments& arguments, const Device& device) {
  return fastest_tile(kSm90Tiles, arguments, device);
}

inline int sm100_tile_tokens(const LinearArguments& arguments, const Device& device) {
  return fastest_tile(kSm100Tiles, arguments, device);
}

}  // namespace permllm::cuda
