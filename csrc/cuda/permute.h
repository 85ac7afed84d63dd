// y[token][j] = x[token][j - j % 128 + permutation[j]], elements of 16 bits.
//
// A warp reads and writes two blocks of 128 elements, 16 bytes a lane. The gather between is in
// shared memory of that warp alone.
#pragma once

#include "arguments.h"
#include "device.h"
#include "format.h"

namespace permllm::cuda {

constexpr int kPermuteThreads = 256;
constexpr int kPermuteTokens = 4;  // of a block: their loads are in flight together
constexpr int kPermuteSharedBytes = kPermuteThreads * kPermuteTokens * 16;

inline Grid permute_grid(const PermuteArguments& arguments) {
  const int64_t lanes = arguments.columns / 8;
  return {static_cast<unsigned>((arguments.tokens + kPermuteTokens - 1) / kPermuteTokens),
          static_cast<unsigned>((lanes + kPermuteThreads - 1) / kPermuteThreads)};
}

PERMLLM_DEVICE void permute_body(const PermuteArguments& arguments, unsigned char* shared) {
  constexpr int kPerLane = 8;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t column =
      (static_cast<int64_t>(blockIdx.y) * kPermuteThreads + threadIdx.x) * kPerLane;
  const bool valid = column < arguments.columns;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kPermuteTokens;
  auto* staged = reinterpret_cast<uint16_t*>(shared + warp * 32 * kPermuteTokens * 16);

  uint8_t places[kPerLane] = {};
  PERMLLM_UNROLL
  for (int j = 0; j < kPerLane; ++j) {
    if (valid) places[j] = arguments.permutation[column + j] % kPermutationBlock;
  }
  PERMLLM_UNROLL
  for (int t = 0; t < kPermuteTokens; ++t) {
    uint4 value{};
    if (valid && first_token + t < arguments.tokens) {
      const uint16_t* x = static_cast<const uint16_t*>(arguments.x) +
                          (first_token + t) * arguments.x_stride + column;
      value = *reinterpret_cast<const uint4*>(x);
    }
    *reinterpret_cast<uint4*>(staged + (t * 32 + lane) * kPerLane) = value;
  }
  sync_warp();
  const int block = lane * kPerLane / kPermutationBlock * kPermutationBlock;
  PERMLLM_UNROLL
  for (int t = 0; t < kPermuteTokens; ++t) {
    alignas(16) uint16_t result[kPerLane];
    PERMLLM_UNROLL
    for (int j = 0; j < kPerLane; ++j) {
      result[j] = staged[t * 32 * kPerLane + block + places[j]];
    }
    if (valid && first_token + t < arguments.tokens) {
      uint16_t* y =
          static_cast<uint16_t*>(arguments.y) + (first_token + t) * arguments.columns + column;
      *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(result);
    }
  }
}

}  // namespace permllm::cuda
