// 16-bit activations in AVX-512 registers: bfloat16, or float16 where LinearOf::half says so.
//
// vdpbf16ps and the tile unit multiply bfloat16 alone. A float16 is the sum of two of them,
// exactly: its 11 bits are 8, rounded, and 3 that are left. Few of them meet bfloat16 values as two
// rows of x, whose sums are added; more are rounded to one. int8 values meet integers, which
// float16 is rounded to like bfloat16.
//
// Include after every other header, and after amx/target.h where there is one.
#pragma once

#include <immintrin.h>

#include "cpu/kernels.h"

namespace permllm::cpu {
namespace {

// The mask of the first `count` (any number) of 32 inputs.
inline __mmask32 first_lanes(int64_t count) {
  return count >= 32 ? 0xffffffff : count <= 0 ? 0 : (1u << count) - 1;
}

inline __m512 widen(__m256i words, bool half) {
  return half ? _mm512_cvtph_ps(words)
              : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

inline __m256i low_words(__m512i words) { return _mm512_castsi512_si256(words); }
inline __m256i high_words(__m512i words) { return _mm512_extracti64x4_epi64(words, 1); }

// To nearest even.
#if defined(__AVX512BF16__) || defined(PERMLLM_TARGET_BF16)
inline __m256i to_bfloat16(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

inline __m512i to_bfloat16(__m512 low, __m512 high) {
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}
#else
inline __m256i to_bfloat16(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 not_numbers = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_set1_epi32(0x00400000);
  const __m512i rounded = _mm512_mask_or_epi32(nearest, not_numbers, bits, quiet);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

inline __m512i to_bfloat16(__m512 low, __m512 high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(to_bfloat16(low)), to_bfloat16(high), 1);
}
#endif

constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

inline __m256i round_words(__m512 values, bool half) {
  return half ? _mm512_cvtps_ph(values, kNearest) : to_bfloat16(values);
}

inline __m512i round_words(__m512 low, __m512 high, bool half) {
  if (!half) return to_bfloat16(low, high);
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(low, kNearest)),
                            _mm512_cvtps_ph(high, kNearest), 1);
}

// An infinity differs from itself by 0.
inline __m512 difference(__m512 a, __m512 b) {
  return _mm512_maskz_sub_ps(_mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ), a, b);
}

// 32 words of float16, rounded to bfloat16, or what that leaves of them.
inline __m512i part_of_half(__m512i words, bool rest) {
  const __m512 low = widen(low_words(words), true), high = widen(high_words(words), true);
  const __m512i rounded = to_bfloat16(low, high);
  return rest ? to_bfloat16(difference(low, widen(low_words(rounded), false)),
                            difference(high, widen(high_words(rounded), false)))
              : rounded;
}

// Inputs first..first+31 of a row of x as bfloat16, where `valid` says that they exist, else zeros.
inline __m512i load_row(const LinearArguments& a, int64_t row, int64_t first, __mmask32 valid) {
  const __m512i words = _mm512_maskz_loadu_epi16(valid, a.x + a.token(row) * a.x_stride + first);
  return a.half ? part_of_half(words, a.parts == 2 && row % 2 != 0) : words;
}

// Inputs first..first+31 of a row of x, half of a block, in the order of the blocks.
inline __m512i load_half(const LinearArguments& a, int64_t row, int64_t first) {
  const auto load = [&](int64_t start) {
    return load_row(a, row, start, first_lanes(a.k - start));
  };
  if (a.behind.order == nullptr) return load(first);
  const int64_t block = first / kBlockInputs * kBlockInputs;
  const auto* order = reinterpret_cast<const __m256i*>(a.behind.order + first);
  return _mm512_permutex2var_epi16(load(block), _mm512_cvtepu8_epi16(_mm256_loadu_si256(order)),
                                   load(block + 32));
}

// The largest magnitude of a token; an infinity or NaN if there is one. As integers, the bits of
// magnitudes have their order.
inline float largest_magnitude(const LinearArguments& a, int64_t token) {
  const bf16* x = a.x + token * a.x_stride;
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < a.k; i += 32) {
    const __m512i words = _mm512_maskz_loadu_epi16(first_lanes(a.k - i), x + i);
    largest = _mm512_max_epu16(largest, _mm512_and_si512(words, magnitude));
  }
  const __m512i low = _mm512_and_si512(largest, _mm512_set1_epi32(0xffff));
  const __m512i high = _mm512_srli_epi32(largest, 16);
  const auto bits = static_cast<int>(_mm512_reduce_max_epu32(_mm512_max_epu32(low, high)));
  return _mm512_cvtss_f32(widen(_mm256_set1_epi16(static_cast<int16_t>(bits)), a.half));
}

}  // namespace
}  // namespace permllm::cpu
