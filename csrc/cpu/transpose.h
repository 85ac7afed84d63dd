// A transpose in AVX-512 registers. Include after every other header, and after amx/target.h where
// there is one.
#pragma once

#include <immintrin.h>

namespace permllm::cpu {
namespace {

// 16 x 16 values of 32 bits, in place.
inline void transpose(__m512i (&r)[16]) {
  constexpr int kEvenLanes = 0x88, kOddLanes = 0xdd;
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  // Column c of rows 4 i..4 i + 3 comes to lane c / 4 of r[4 i + c % 4].
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], kEvenLanes);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], kOddLanes);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], kEvenLanes);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], kOddLanes);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], kEvenLanes);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], kOddLanes);
  }
}

}  // namespace
}  // namespace permllm::cpu
