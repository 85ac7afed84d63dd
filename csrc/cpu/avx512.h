// What the AVX-512 kernels share: the tuning constants of this instruction set, and vector pieces.
// Include after every other header, in files that are compiled for AVX-512 only.
#pragma once

#include <immintrin.h>

#include "layout.h"

namespace permllm::cpu {
namespace {

// Measured on Zen 4 (1 MiB of L2 per core, 26-30 GB/s of stream for one core).
namespace tuning {
constexpr int kIntoL1 = 3, kIntoL2 = 2;  // prefetcht0, prefetcht1, as __builtin_prefetch counts

// Few tokens. Prefetching overlaps with the arithmetic only where it stops in L2.
constexpr int kFewHint = kIntoL2;
constexpr int kFewFetchTokens = 2;            // one is fetched as fast by the hardware alone
constexpr int kFewFetchTokensInt8 = 1;        // but not where its bytes are fewer
constexpr int kFewAhead = 13824;              // bytes, where one pass takes all rows
constexpr int kFewAheadPasses = 18432;        // and where several passes take some rows each
constexpr int64_t kFewChunkBytes = 20 << 10;  // x and blocks that those passes share, in L1
constexpr int kSplitTokens = 2;               // int8: W8A16 up to here, W8A8 beyond
constexpr int64_t kPackBlocks = 16;           // of up to 16 tokens, that a thread packs at a time

// Several tokens.
constexpr int64_t kSeveralChunkBytes = 512;  // of a row, expanded at a time, beside x in L1
constexpr int kSeveralAhead = 9216;          // bytes

// Many tokens. The blocks of the next steps fit L1 and are wanted there.
constexpr int kManyHint = kIntoL1;
constexpr int kManyHintX = kIntoL2;    // those of x fit L2
constexpr int kManyAhead = 2;          // steps of one row group and one chunk of inputs
constexpr int64_t kChunkBytes = 2048;  // of a row, expanded at a time: 8 rows are half of L1
constexpr int64_t kPanelGroups = 16;   // row groups whose sums wait in L2 for the next chunk
constexpr int64_t kTokenVectors = 16;  // of 16 tokens: what one expansion serves at most
}  // namespace tuning

constexpr int kRows = kAvx512Rows;
constexpr int kLanes = 16;  // 32-bit lanes: pairs of inputs, or tokens
using Rows8 = Block<kRows>;
using Int8Rows8 = Block<kRows, int8_t>;

#define PERMLLM_UNROLL _Pragma("GCC unroll 32")

template <int Hint, int Bytes>
inline void prefetch(const char* memory) {
  PERMLLM_UNROLL
  for (int offset = 0; offset < Bytes; offset += 64) __builtin_prefetch(memory + offset, 0, Hint);
}

// Moves the first values to the places that the mask keeps, zeros elsewhere. Zen 4 waits for the
// old content of the destination even where the instruction zeroes it, which makes a chain of 5
// cycles of expansions to one register: the merging form into a register that is freshly zero has
// none.
inline __m512i expand_values(__mmask32 mask, const bf16* values) {
  __m512i zero = _mm512_setzero_si512();
  __asm__("" : "+v"(zero));  // keeps the compiler from choosing the zeroing form
  return _mm512_mask_expand_epi16(zero, mask, _mm512_loadu_si512(values));
}

// Inputs 0..31 of one row of a block, zeros where pruned.
inline __m512i expand_low(const Rows8& block, int row) {
  return expand_values(static_cast<__mmask32>(block.mask[row]), block.values[row]);
}

// Inputs 32..63. Reads up to 64 bytes past the row's values: the allocation's tail allows it.
inline __m512i expand_high(const Rows8& block, int row) {
  const uint64_t mask = block.mask[row];
  const int skip = __builtin_popcount(static_cast<uint32_t>(mask));
  return expand_values(static_cast<__mmask32>(mask >> 32), block.values[row] + skip);
}

// All 64 inputs of one row of a block of int8 values, zeros where pruned.
inline __m512i expand_int8(const Int8Rows8& block, int row) {
  __m512i zero = _mm512_setzero_si512();
  __asm__("" : "+v"(zero));
  const auto* values = reinterpret_cast<const __m256i*>(block.values[row]);
  return _mm512_mask_expand_epi8(zero, block.mask[row],
                                 _mm512_zextsi256_si512(_mm256_load_si256(values)));
}

// The mask of the first `count` (any number) of 32 inputs.
inline __mmask32 first_lanes(int64_t count) {
  return count >= 32 ? 0xffffffff : count <= 0 ? 0 : (1u << count) - 1;
}

inline __m512 dot_pairs(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// [16][16] 32-bit transpose, in place.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  PERMLLM_UNROLL
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  PERMLLM_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  PERMLLM_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  PERMLLM_UNROLL
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

}  // namespace
}  // namespace permllm::cpu
