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

#define PERMLLM_UNROLL _Pragma("GCC unroll 32")

template <int Hint, int Bytes>
inline void prefetch(const char* memory) {
  PERMLLM_UNROLL
  for (int offset = 0; offset < Bytes; offset += 64) __builtin_prefetch(memory + offset, 0, Hint);
}

#if defined(__AVX512BF16__)
inline __m512 dot_pairs(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#endif

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
