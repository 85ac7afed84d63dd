// From sums in shared memory to y, or to partial sums and then to y.
#pragma once

#include "arguments.h"
#include "element.h"
#include "weight_stage.h"

namespace permllm::cuda {

// Floats between tokens of a tile of sums.
constexpr int kTilePitch = kStepRows + 4;

// Eight rows of one token: scale, bias, rounding, one store of 16 bytes where the rows are whole.
template <class Element>
PERMLLM_DEVICE void finish(const LinearArguments& arguments, float (&sums)[8], int row, int token) {
  if (row >= arguments.rows) return;
  const auto* bias = static_cast<const uint16_t*>(arguments.bias);
  const int count = arguments.rows - row < 8 ? arguments.rows - row : 8;
  alignas(16) uint16_t rounded[8];
  PERMLLM_UNROLL
  for (int i = 0; i < 8; ++i) {
    if (i < count && arguments.scale != nullptr) sums[i] *= arguments.scale[row + i];
    if (i < count && bias != nullptr) sums[i] += Element::to_float(bias[row + i]);
    rounded[i] = Element::from_float(sums[i]);
  }
  uint16_t* y = static_cast<uint16_t*>(arguments.y) + int64_t{token} * arguments.rows + row;
  if (arguments.rows % 8 == 0) {
    *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(rounded);
    return;
  }
  PERMLLM_UNROLL
  for (int i = 0; i < 8; ++i) {
    if (i < count) y[i] = rounded[i];
  }
}

// Writes a tile [kTokens][128] of sums to y, or, where `partial` is not null, unfinished to
// partial[token][padded_rows].
template <class Element, int kTokens>
PERMLLM_DEVICE void write_tile(const LinearArguments& arguments, const float* tile, float* partial,
                               int row, int token) {
  for (int index = threadIdx.x; index < kTokens * kStepRows / 8; index += kMmaThreads) {
    const int local_token = index / (kStepRows / 8);
    const int local_row = index % (kStepRows / 8) * 8;
    if (token + local_token >= arguments.tokens) continue;
    const float* source = tile + local_token * kTilePitch + local_row;
    const float4 low = *reinterpret_cast<const float4*>(source);
    const float4 high = *reinterpret_cast<const float4*>(source + 4);
    if (partial != nullptr) {
      float* target =
          partial + int64_t{token + local_token} * arguments.padded_rows + row + local_row;
      *reinterpret_cast<float4*>(target) = low;
      *reinterpret_cast<float4*>(target + 4) = high;
    } else {
      float sums[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      finish<Element>(arguments, sums, row + local_row, token + local_token);
    }
  }
}

// Adds the partial sums [splits][tokens][padded_rows] in the order of the splits, so that the
// result does not depend on which block was first. A thread per 8 rows of a token.
constexpr int kReduceThreads = 128;

inline Grid reduce_grid(const LinearArguments& arguments) {
  constexpr int kPerBlock = kReduceThreads * 8;
  return {static_cast<unsigned>((arguments.padded_rows + kPerBlock - 1) / kPerBlock),
          static_cast<unsigned>(arguments.tokens)};
}

template <class Element>
PERMLLM_DEVICE void reduce_body(const LinearArguments& arguments, const float* partial,
                                int splits) {
  const int token = blockIdx.y;
  const int row =
      (static_cast<int>(blockIdx.x) * kReduceThreads + static_cast<int>(threadIdx.x)) * 8;
  if (row >= arguments.padded_rows) return;
  const int64_t plane = int64_t{arguments.tokens} * arguments.padded_rows;
  const float* source = partial + int64_t{token} * arguments.padded_rows + row;
  float sums[8] = {};
  for (int split = 0; split < splits; ++split) {
    const float4 low = *reinterpret_cast<const float4*>(source + split * plane);
    const float4 high = *reinterpret_cast<const float4*>(source + split * plane + 4);
    const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    PERMLLM_UNROLL
    for (int i = 0; i < 8; ++i) sums[i] += values[i];
  }
  finish<Element>(arguments, sums, row, token);
}

}  // namespace permllm::cuda
