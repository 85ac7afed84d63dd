// Activations as integers for the AVX-512 kernels of int8 values.
//
// One scale per token: x is close to quantized * scale, and the largest magnitude of the token
// becomes the largest integer. vpdpbusd multiplies unsigned with signed bytes, so quantized x is
// shifted to be unsigned; the kernels subtract shift * sum of the row's values from every sum.
#pragma once

#include "kernels.h"
// The vector code comes last.
#include "avx512.h"

namespace permllm::cpu {
namespace {

constexpr int kLargest8 = 127, kShift8 = 128;        // W8A8
constexpr int kLargest16 = 32767, kShift16 = 32768;  // W8A16

// Below it (2^-100) a token counts as zero: its inverse scale would leave float32.
constexpr float kSmallestMagnitude = 0x1p-100f;

// The largest magnitude of a token; an infinity or NaN if there is one.
inline float largest_magnitude(const bf16* x, int64_t k) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i largest = _mm512_setzero_si512();  // bits of magnitudes are ordered as integers
  for (int64_t i = 0; i < k; i += 32) {
    const __m512i bits = _mm512_maskz_loadu_epi16(first_lanes(k - i), x + i);
    largest = _mm512_max_epu16(largest, _mm512_and_si512(bits, magnitude));
  }
  const __m512i low = _mm512_and_si512(largest, _mm512_set1_epi32(0xffff));
  const __m512i high = _mm512_srli_epi32(largest, 16);
  const uint32_t bits = _mm512_reduce_max_epu32(_mm512_max_epu32(low, high)) << 16;
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(bits))));
}

// 16 values of x, bits in the upper half of each lane, times the inverse scale, shifted to
// [0, 2 * shift). The results for NaN and infinity, whose scale is no number either, do not matter.
inline __m512i quantize(__m512i bits, __m512 inverse, int shift) {
  const __m512i upper = _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
  const __m512 scaled = _mm512_mul_ps(_mm512_castsi512_ps(upper), inverse);
  return _mm512_add_epi32(_mm512_cvtps_epi32(scaled), _mm512_set1_epi32(shift));
}

// How a token becomes integers and back.
struct TokenScale {
  float scale;
  float inverse;

  TokenScale(const bf16* x, int64_t k, int largest_integer) {
    const float largest = largest_magnitude(x, k);
    const auto integer = static_cast<float>(largest_integer);
    scale = largest / integer;
    inverse = largest < kSmallestMagnitude ? 0.0f : integer / largest;
  }
};

// Inputs first..first+31 of a token as 16-bit integers, in order; what no value meets, past k, is
// the shift.
inline __m512i quantize_inputs(const bf16* x, int64_t k, int64_t first, float inverse, int shift) {
  const __m512i bits = _mm512_maskz_loadu_epi16(first_lanes(k - first), x + first);
  const __m512 factor = _mm512_set1_ps(inverse);
  const __m512i even = quantize(_mm512_slli_epi32(bits, 16), factor, shift);
  const __m512i odd = quantize(bits, factor, shift);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16));
}

}  // namespace
}  // namespace permllm::cpu
