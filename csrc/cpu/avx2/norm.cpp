#include "cpu/norm.h"

#include <immintrin.h>

#include <cmath>

#include "cpu/vector/vector.h"

namespace permllm::cpu {
namespace {

constexpr int64_t kLanes = 8;
constexpr int kSums = 4;  // of squares, whose additions do not wait for each other

inline __m128i eight_words(const void* words) {
  return _mm_loadu_si128(static_cast<const __m128i*>(words));
}

inline __m256 widen(const float* values) { return _mm256_loadu_ps(values); }
inline __m256 widen(const fp16* values) { return _mm256_cvtph_ps(eight_words(values)); }
inline __m256 widen(const bf16* values) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight_words(values)), 16));
}

// To nearest even, as round_to does.
inline __m256i bits_of_bfloat16(__m256 values) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256i not_numbers = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(nearest, quiet, not_numbers), 16);
}

inline __m256 rounded(__m256 values, const float*) { return values; }
inline __m256 rounded(__m256 values, const fp16*) {
  return _mm256_cvtph_ps(_mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}
inline __m256 rounded(__m256 values, const bf16*) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits_of_bfloat16(values), 16));
}

inline void store(float* target, __m256 values) { _mm256_storeu_ps(target, values); }
inline void store(fp16* target, __m256 values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target),
                   _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(bf16* target, __m256 values) {
  const __m256i words = bits_of_bfloat16(values);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), packed);
}

// A token, eight of its inputs at a time and the last ones each alone.
template <class Real>
struct Token {
  const Real* x;
  Real* residual;

  __m256 eight(int64_t i) const {
    const __m256 own = widen(x + i);
    return residual == nullptr ? own : _mm256_add_ps(own, widen(residual + i));
  }

  float one(int64_t i) const {
    return residual == nullptr ? to_float(x[i]) : to_float(x[i]) + to_float(residual[i]);
  }
};

template <class Real>
float mean_square(const Token<Real>& token, int64_t n) {
  __m256 sums[kSums] = {};
  int64_t i = 0;
  const auto add = [&](int sum) {
    const __m256 values = token.eight(i);
    sums[sum] = _mm256_fmadd_ps(values, values, sums[sum]);
    i += kLanes;
  };
  while (i + kSums * kLanes <= n) {
    PERMLLM_UNROLL for (int sum = 0; sum < kSums; ++sum) add(sum);
  }
  while (i + kLanes <= n) add(0);
  const __m256 both =
      _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
  float lanes[kLanes];
  _mm256_storeu_ps(lanes, both);
  float total = 0;
  for (const float lane : lanes) total += lane;
  for (; i < n; ++i) total += token.one(i) * token.one(i);
  return total / static_cast<float>(n);
}

}  // namespace

template <class Real, class Weight>
void avx2_norm(const NormOf<Real, Weight>& a, int64_t first, int64_t last) {
  for (int64_t t = first * a.n; t < last * a.n; t += a.n) {
    const Token<Real> token{a.x + t, a.residual == nullptr ? nullptr : a.residual + t};
    const float scale = 1.0f / std::sqrt(mean_square(token, a.n) + a.epsilon);
    const __m256 scales = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + kLanes <= a.n; i += kLanes) {
      const __m256 values = token.eight(i);
      if (token.residual != nullptr) store(token.residual + i, values);
      __m256 product = _mm256_mul_ps(values, scales);
      if (a.weight != nullptr) {
        product = _mm256_mul_ps(rounded(product, a.weight), widen(a.weight + i));
      }
      store(a.y + t + i, product);
    }
    for (; i < a.n; ++i) {
      const float value = token.one(i);
      if (token.residual != nullptr) round_to(token.residual[i], value);
      float product = value * scale;
      if (a.weight != nullptr) {
        Weight word;
        round_to(word, product);
        product = to_float(word) * to_float(a.weight[i]);
      }
      round_to(a.y[t + i], product);
    }
  }
}

template void avx2_norm(const NormOf<bf16, bf16>&, int64_t, int64_t);
template void avx2_norm(const NormOf<bf16, float>&, int64_t, int64_t);
template void avx2_norm(const NormOf<fp16, fp16>&, int64_t, int64_t);
template void avx2_norm(const NormOf<fp16, float>&, int64_t, int64_t);
template void avx2_norm(const NormOf<float, float>&, int64_t, int64_t);

}  // namespace permllm::cpu
