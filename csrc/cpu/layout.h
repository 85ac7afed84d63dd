// Packed weight of an N:M sparse linear layer on the CPU.
//
// Blocks are stored [row group][64-input block]. One block holds `Rows` output rows x 64 inputs:
//   Rows x uint64 mask      bit j of row r is set where input j of the block is kept
//   Rows x 32 bfloat16      the kept values of the row, ascending by input
// Every row keeps exactly 32 of 64 inputs (2:4 and 4:8 alike, with the permutation undone).
// Padding, that is rows past n and inputs past k, has masks filled up to 32 bits and values of
// zero.
//
// This header is included by files that are compiled for one instruction set: its functions are
// static, so that no copy of theirs can be linked into a file that is compiled for another.
#pragma once

#include <cstdint>

namespace permllm::cpu {

using bf16 = uint16_t;  // the bits of a bfloat16

constexpr int kBlockInputs = 64;
constexpr int kBlockValues = 32;

template <int Rows>
struct alignas(64) Block {
  uint64_t mask[Rows];
  bf16 values[Rows][kBlockValues];
};

constexpr int kAmxRows = 16;    // 1152 bytes: one tile of 16 rows
constexpr int kAvx512Rows = 8;  // 576 bytes
constexpr int kPortableRows = 8;

// Kernels may read this far past the last block (prefetch excluded): the allocation adds it.
constexpr int64_t kTailBytes = 128;

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The int64 metadata tensor beside the packed bytes.
namespace header {
enum Field : int { kLayout, kIsa, kRows, kOutputs, kInputs, kSize };
}
constexpr int64_t kLayoutVersion = 0x7065726d'00000001;  // "perm", then the version

}  // namespace permllm::cpu
