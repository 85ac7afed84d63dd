// What the AVX-512 kernels share: vector pieces.
// Include after every other header, in files that are compiled for AVX-512 only.
#pragma once

#include <immintrin.h>

#include "layout.h"
#include "tuning.h"

namespace permllm::cpu {
namespace {

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

// All 64 inputs of one row of a block, zeros where pruned. Reads up to 64 bytes past the row's
// values: the allocation's tail allows it.
template <class Tuning>
inline void expand_row(const Rows8& block, int row, __m512i (&weights)[2]) {
  if constexpr (Tuning::kMasksFromMemory) {
    const auto* halves =
        reinterpret_cast<const uint32_t __attribute__((may_alias))*>(block.mask + row);
    __mmask32 low, high;
    __asm__("kmovd %1, %0" : "=k"(low) : "m"(halves[0]));
    __asm__("kmovd %1, %0" : "=k"(high) : "m"(halves[1]));
    weights[0] = expand_values(low, block.values[row]);
    weights[1] = expand_values(high, block.values[row] + __builtin_popcount(halves[0]));
    return;
  }
  // The compiler is kept from loading the mask in two halves, which takes longer where memory is
  // waited for, and from moving its upper half to a mask register as 64 bits, which takes twice the
  // cycles of 32.
  uint64_t mask = block.mask[row];
  __asm__("" : "+r"(mask));
  const auto low = static_cast<uint32_t>(mask);
  auto high = static_cast<uint32_t>(mask >> 32);
  __asm__("" : "+r"(high));
  weights[0] = expand_values(low, block.values[row]);
  weights[1] = expand_values(high, block.values[row] + __builtin_popcount(low));
}

// All 64 inputs of one row of a block of int8 values, zeros where pruned.
inline __m512i expand_int8(const Int8Rows8& block, int row) {
  __m512i zero = _mm512_setzero_si512();
  __asm__("" : "+v"(zero));
  const auto* values = reinterpret_cast<const __m256i*>(block.values[row]);
  return _mm512_mask_expand_epi8(zero, block.mask[row],
                                 _mm512_zextsi256_si512(_mm256_load_si256(values)));
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
