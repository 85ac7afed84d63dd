// Packed weight of an N:M sparse linear layer on the CPU.
//
// Blocks are stored [row group][64-input block]. One block holds `Rows` output rows x 64 inputs:
//   Rows x uint64 mask      bit j of row r is set where input j of the block is kept
//   Rows x 32 values        the kept values of the row, bfloat16 or int8, ascending by input
// Behind the blocks of int8 values stands, for every row of every row group, the int32 sum of its
// values: kernels that shift x to be unsigned subtract the shift times this sum. The float32 scale
// of a row, w = value * scale, is no part of the packed bytes.
//
// Every row keeps exactly 32 of 64 inputs, 2:4 and 4:8 alike. For amx and avx512_bf16 that is all:
// the permutation is undone. For avx512, avx2 and portable the inputs stay in permuted order, where
// a row keeps four of every eight inputs, so that the place of their values is known.
// Padding, that is rows past n and inputs past k, has masks filled up to 32 bits and values of
// zero.
//
// This header is included by files that are compiled for one instruction set: its functions are
// static, so that no copy of theirs can be linked into a file that is compiled for another.
#pragma once

#include <cstdint>

namespace permllm::cpu {

using bf16 = uint16_t;  // the bits of a bfloat16

// The bits of a float16; a type of its own, so that none is taken for a bfloat16.
struct fp16 {
  uint16_t bits;
};

constexpr int kBlockInputs = 64;
constexpr int kBlockValues = 32;

template <int Rows, class Value = bf16>
struct alignas(64) Block {
  uint64_t mask[Rows];
  Value values[Rows][kBlockValues];
};

// Part of the format, not tuned: a tile has 16 rows, and 8 rows of masks are a cache line.
constexpr int kAmxRows = 16;    // 1152 bytes, int8 640
constexpr int kAvx512Rows = 8;  // 576 bytes, int8 320
constexpr int kPortableRows = 8;

// Row groups that the AMX kernels multiply side by side: as many as the tile registers hold sums
// of. Threads share out such pairs, when a weight is packed and when it is multiplied.
constexpr int kAmxGroups = 2;

// What the values are. The numbers are part of the metadata.
enum class ValueType : int64_t { kBfloat16 = 0, kInt8 = 1 };

// Sums of products of int8 values with 8 bits of x fit an int32 up to this many inputs.
constexpr int64_t kInt8Inputs = int64_t{1} << 17;

// Kernels may read this far past the last block (prefetch excluded): the allocation adds it.
constexpr int64_t kTailBytes = 128;

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The int64 metadata tensor beside the packed bytes.
namespace header {
enum Field : int { kLayout, kIsa, kRows, kOutputs, kInputs, kValues, kSize };
}
constexpr int64_t kLayoutVersion = 0x7065726d'00000002;  // "perm", then the version

}  // namespace permllm::cpu
