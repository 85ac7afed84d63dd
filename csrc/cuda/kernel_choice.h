// Which kernel multiplies, and in which tiles: from shapes, types and the GPU alone, so that a
// launch can be captured in a graph. No header of CUDA or CUTLASS: tested on the host.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "few_tokens_plan.h"
#include "format.h"
#include "many_tokens_plan.h"
#include "throughput.h"

namespace permllm::cuda {

enum class LinearKernel {
  kFewTokens,
  kManyTokensMma,
  kManyTokensSm90,
  kManyTokensSm90Permuting,
  kManyTokensSm100
};

// The kernels of CUTLASS that a build has, by the GPUs that they run on.
struct CutlassKernels {
  bool sm90;
  bool sm100;
  bool sm103;  // the one of sm_100, compiled for its family
};

// A tile of CUTLASS' kernels: 128 rows by `tokens`. Of a cluster, tiles above each other share the
// activations that they load, and tiles beside each other the weights.
struct CutlassTile {
  int tokens;
  int row_cluster;
  int token_cluster;
  int shared_clocks;  // that shared memory takes for 128 inputs
};

// Shared memory binds before the tensor cores do (docs/cuda.md, a model: 128 bytes a clock): reads
// of products and writes of TMA.
constexpr CutlassTile kSm90Tiles[] = {
    {256, 2, 1, 1168 + 656}, {128, 2, 1, 656 + 400}, {64, 1, 1, 400 + 272}};
// Reads of 2 bytes a lane and writes of 4 bytes besides, which permute.
constexpr CutlassTile kSm90PermutingTiles[] = {{64, 1, 2, 400 + 272 + 256 + 128},
                                               {32, 1, 2, 272 + 208 + 128 + 64}};
// Two processors multiply together: each reads its own rows, and half of the activations.
constexpr CutlassTile kSm100Tiles[] = {
    {256, 2, 1, 400 + 400}, {128, 2, 1, 272 + 272}, {64, 2, 1, 208 + 208}};

// Up to so many tokens the kernel for few is compared with those for many: these have no split over
// inputs, so that narrow layers leave processors without work. A guess.
constexpr int kMostCompared = 256;

struct TileChoice {
  int tokens;
  int64_t clocks;  // for 128 inputs
};

// The tile that takes the fewest clocks: rounds over the processors times the length of a tile, or
// the bytes that all tiles read from the cache. A tile that is partly empty costs as much as a full
// one. Of equals the first, which is larger: it reads the weight less often.
template <class Tiles>
TileChoice fastest_tile(const Tiles& choices, const LinearArguments& arguments,
                        const Device& device) {
  TileChoice best{0, INT64_MAX};
  for (const CutlassTile& tile : choices) {
    const int64_t rows = round_up(arguments.padded_rows / kRowMultiple, tile.row_cluster);
    const int64_t columns =
        round_up((arguments.tokens + tile.tokens - 1) / tile.tokens, tile.token_cluster);
    const int64_t tiles = rows * columns;
    const int64_t rounds = (tiles + device.processors - 1) / device.processors;
    const int64_t bytes = weight_stage_bytes(kRowMultiple, arguments.int8) / tile.token_cluster +
                          2 * kInputMultiple * tile.tokens / tile.row_cluster;
    const int64_t clocks =
        std::max(rounds * tile.shared_clocks,
                 tiles * bytes / (int64_t{device.processors} * kCacheBytesPerClock));
    if (clocks < best.clocks) best = {tile.tokens, clocks};
  }
  return best;
}

// Of a kernel for many tokens.
inline TileChoice tile_of(LinearKernel kernel, const LinearArguments& arguments,
                          const Device& device) {
  switch (kernel) {
    case LinearKernel::kManyTokensSm90:
      return fastest_tile(kSm90Tiles, arguments, device);
    case LinearKernel::kManyTokensSm90Permuting:
      return fastest_tile(kSm90PermutingTiles, arguments, device);
    case LinearKernel::kManyTokensSm100:
      return fastest_tile(kSm100Tiles, arguments, device);
    default:
      break;
  }
  const int tokens = many_tokens_tile(arguments.int8, device);
  const CutlassTile only[] = {{tokens, 1, 1, many_tokens_step_clocks(tokens, arguments.int8)}};
  return fastest_tile(only, arguments, device);
}

// Of a pass in front of the product, which reads and writes the activations once more.
inline int64_t pass_clocks(const LinearArguments& arguments, const Device& device) {
  return kPassClocks + int64_t{4} * arguments.tokens * arguments.inputs /
                           (device.processors * kCacheBytesPerClock);
}

// Whether permuting within the product takes fewer clocks than a pass in front of it.
inline bool sm90_permutes_itself(const LinearArguments& arguments, const Device& device) {
  if (arguments.permutation == nullptr) return false;
  const int64_t steps = arguments.padded_inputs / kInputMultiple;
  return steps * fastest_tile(kSm90PermutingTiles, arguments, device).clocks <
         steps * fastest_tile(kSm90Tiles, arguments, device).clocks +
             pass_clocks(arguments, device);
}

// Of the kernel for few tokens, as it is planned: permuting itself, and after a pass. Without a
// permutation both are those of the product.
struct FewTokensClocks {
  int64_t permuting;
  int64_t after_pass;
};

inline FewTokensClocks planned_few_tokens_clocks(const LinearArguments& arguments,
                                                 const Device& device) {
  const auto clocks = [&](const LinearArguments& of) {
    return few_tokens_clocks(of, device, plan_few_tokens(of, device));
  };
  const int64_t itself = clocks(arguments);
  if (arguments.permutation == nullptr) return {itself, itself};
  LinearArguments permuted = arguments;
  permuted.permutation = nullptr;
  return {itself, clocks(permuted) + pass_clocks(arguments, device)};
}

// The kernel for many tokens.
inline LinearKernel choose_many(const LinearArguments& arguments, const Device& device,
                                const CutlassKernels& built) {
  // TMA writes y 16 bytes at a time; CUTLASS has no product of int8 weights and 16-bit activations.
  if (arguments.int8 || arguments.rows % 8 != 0) return LinearKernel::kManyTokensMma;
  const int capability = device.capability;
  if (built.sm90 && capability == 90) {
    return sm90_permutes_itself(arguments, device) ? LinearKernel::kManyTokensSm90Permuting
                                                   : LinearKernel::kManyTokensSm90;
  }
  if ((built.sm100 && capability == 100) || (built.sm103 && capability == 103)) {
    return LinearKernel::kManyTokensSm100;
  }
  return LinearKernel::kManyTokensMma;
}

// With the permutation, if there is one.
inline int64_t many_tokens_clocks(LinearKernel kernel, const LinearArguments& arguments,
                                  const Device& device) {
  const int64_t steps = arguments.padded_inputs / kInputMultiple;
  const bool passes = arguments.permutation && kernel != LinearKernel::kManyTokensSm90Permuting;
  return std::max(steps * tile_of(kernel, arguments, device).clocks,
                  memory_clocks(arguments, device)) +
         (passes ? pass_clocks(arguments, device) : 0);
}

struct KernelChoice {
  LinearKernel kernel;
  bool takes_a_pass;  // it is given activations that a pass in front of it has permuted
};

// With few tokens permuting hides behind the bytes of the weight. More are compared once for both
// questions: the host answers them at every call.
inline KernelChoice choose_kernel(const LinearArguments& arguments, const Device& device,
                                  const CutlassKernels& built) {
  const bool permutes = arguments.permutation != nullptr;
  if (arguments.tokens <= kFewTokens && !permutes) return {LinearKernel::kFewTokens, false};
  FewTokensClocks few{INT64_MAX, INT64_MAX};
  if (arguments.tokens <= kMostCompared) few = planned_few_tokens_clocks(arguments, device);
  if (arguments.tokens > kFewTokens) {
    const LinearKernel many = choose_many(arguments, device, built);
    if (std::min(few.permuting, few.after_pass) >= many_tokens_clocks(many, arguments, device)) {
      return {many, permutes && many != LinearKernel::kManyTokensSm90Permuting};
    }
  }
  return {LinearKernel::kFewTokens, few.permuting > few.after_pass};
}

}  // namespace permllm::cuda
