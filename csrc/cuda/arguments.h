// What the kernels take, without any header of CUDA: the bindings include it.
#pragma once

#include <cstdint>

namespace permllm::cuda {

enum class ElementType { kBFloat16, kFloat16 };

// y[tokens][rows] = x[tokens][inputs], permuted, times the packed weight (format.h), plus bias.
// Sums are in float32; y is rounded once, to nearest even, after scale and bias.
struct LinearArguments {
  ElementType element;  // of x, bias and y
  bool int8;            // values; of the type of x otherwise
  const void* x;        // 16-byte aligned rows, `x_stride` elements apart (a multiple of 8)
  int64_t x_stride;
  int tokens;
  const void* values;
  const uint8_t* metadata;
  const uint8_t* permutation;  // or null
  const float* scale;          // or null
  const void* bias;            // or null
  void* y;                     // contiguous
  int rows;
  int inputs;  // a multiple of 8
  int padded_rows;
  int padded_inputs;
};

// y[token][j] = x[token][j - j % 128 + permutation[j]], elements of 16 bits.
struct PermuteArguments {
  const void* x;  // 16-byte aligned rows, `x_stride` elements apart
  int64_t x_stride;
  const uint8_t* permutation;  // [columns], each inside its block of 128
  void* y;                     // contiguous
  int64_t tokens;
  int64_t columns;  // a multiple of 8
};

// A GPU as products are planned and launched for it.
struct Device {
  int index;       // of CUDA
  int capability;  // 10 * major + minor
  int processors;
  int shared_bytes_per_processor;
};

// A launch has at most 65535 blocks in its second dimension: one for every 128 rows, and in the
// permutation kernel one for every 2048 inputs.
constexpr int kMostBlocks = 65535;
constexpr int64_t kMostRows = int64_t{kMostBlocks} * 128;
constexpr int64_t kMostInputs = int64_t{kMostBlocks} * 2048;

// Blocks of a launch. Each kernel's own stands beside its body.
struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

}  // namespace permllm::cuda
