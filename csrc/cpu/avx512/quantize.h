// Activations as integers for the AVX-512 kernels of int8 values.
//
// One scale per token (token_scale.h). vpdpbusd multiplies unsigned with signed bytes, so quantized
// x is shifted to be unsigned.
#pragma once

#include "cpu/kernels.h"
#include "cpu/token_scale.h"
// The vector code comes last.
#include "cpu/avx512/avx512.h"
#include "cpu/words.h"

namespace permllm::cpu {
namespace {

// 16 values of x times the inverse scale, shifted to [0, 2 * shift). The results for NaN and
// infinity, whose scale is no number either, do not matter.
inline __m512i quantize(__m512 values, __m512 inverse, int shift) {
  return _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(values, inverse)),
                          _mm512_set1_epi32(shift));
}

// Inputs first..first+31 of a token as 16-bit integers, in order; what no value meets, past k, is
// the shift.
inline __m512i quantize_inputs(const LinearArguments& a, int64_t token, int64_t first,
                               float inverse, int shift) {
  const __m512i words =
      _mm512_maskz_loadu_epi16(first_lanes(a.k - first), a.x + token * a.x_stride + first);
  const __m512 factor = _mm512_set1_ps(inverse);
  if (a.half) {
    const __m512i low = quantize(widen(low_words(words), true), factor, shift);
    const __m512i high = quantize(widen(high_words(words), true), factor, shift);
    return join(_mm512_cvtepi32_epi16(low), _mm512_cvtepi32_epi16(high));
  }
  // Where they stand in their lanes, bfloat16 is float32: even ones shifted, odd ones masked.
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const __m512i even = quantize(_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)), factor, shift);
  const __m512i odd = quantize(_mm512_castsi512_ps(_mm512_and_si512(words, upper)), factor, shift);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16));
}

}  // namespace
}  // namespace permllm::cpu
