// int8 values where a vector holds inputs of one token: vpdpbusd on four of them in each lane.
//
// W8A16: x is a 16-bit integer, and its upper and lower bytes have a sum each.
// W8A8: x is an 8-bit integer, half of the products.
//
// Include after every other header, in files that are compiled for AVX-512 only.
#pragma once

#include <type_traits>

#include "cpu/avx512/quantize.h"
// The vector code comes last.
#include "cpu/avx512/expand.h"

namespace permllm::cpu {
namespace {

// As avx512/few.h and avx512/several.h ask for them.
template <class CoreTuning, class BlockValue, int Bytes>
struct Int8Products {
  using Tuning = CoreTuning;
  using Value = BlockValue;
  using Rows = ExpandedRows<Tuning, Value>;
  static constexpr int kWeights = 1, kInputs = Bytes, kSums = Bytes;
  static constexpr int kOneTokenFetch =
      std::is_same_v<Value, dense8> ? Tuning::kOneTokenFetch : Tuning::kOneTokenFetchInt8;
  static constexpr int kFewRows = Tuning::kFewRows;
  static constexpr int kSeveralAhead = Tuning::kSeveralAhead;
  static constexpr int kLargest = Bytes == 2 ? kLargest16 : kLargest8;
  static constexpr int kShift = Bytes == 2 ? kShift16 : kShift8;

  static constexpr int rows_per_pass(int tokens) {
    return kRows * tokens * Bytes <= Tuning::kSums ? kRows : kRows / 2;
  }

  static constexpr int64_t several_chunk_bytes(int) { return Tuning::kSeveralChunkBytes; }
  static constexpr int several_hint(int) { return Tuning::kSeveralHint; }

  static void multiply(__m512i (&sums)[Bytes], const __m512i (&weights)[1], int byte, __m512i x) {
    sums[byte] = multiply_one(sums[byte], weights[0], x);
  }

  static __m512i multiply_one(__m512i sum, __m512i weights, __m512i x) {
    return _mm512_dpbusd_epi32(sum, x, weights);
  }

  static __m512i add(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }

  struct Inputs {
    explicit Inputs(const LinearArguments& arguments)
        : a(arguments), scales(a.token_scales), inverses(scales + a.m) {}

    int64_t measures() const { return a.m; }

    void measure(int64_t t) const {
      const TokenScale token(largest_magnitude(a, t), kLargest);
      scales[t] = token.scale;
      inverses[t] = token.inverse;
    }

    // With two bytes, the upper ones first.
    void load(int64_t token, int64_t block, __m512i (&vectors)[Bytes]) const {
      const int64_t first = block * kBlockInputs;
      const __m512i low = quantize_inputs(a, token, first, inverses[token], kShift);
      const __m512i high = quantize_inputs(a, token, first + 32, inverses[token], kShift);
      vectors[Bytes - 1] = join(_mm512_cvtepi16_epi8(low), _mm512_cvtepi16_epi8(high));
      if constexpr (Bytes == 2) {
        vectors[0] = join(_mm512_cvtepi16_epi8(_mm512_srli_epi16(low, 8)),
                          _mm512_cvtepi16_epi8(_mm512_srli_epi16(high, 8)));
      }
      if (a.behind.order == nullptr) return;
      const __m512i order = _mm512_loadu_si512(a.behind.order + first);
      for (__m512i& vector : vectors) vector = _mm512_permutexvar_epi8(order, vector);
    }

    const LinearArguments& a;
    float* scales;
    float* inverses;
  };

  struct Outputs {
    Outputs(const LinearArguments& arguments, const Inputs& inputs)
        : a(arguments), scales(inputs.scales) {}

    // The shift is 128 of the upper byte.
    __m256 convert(const __m256i (&sums)[Bytes], int64_t row, __mmask8 mask, int64_t token) const {
      const auto* values = reinterpret_cast<const __m256i*>(a.behind.value_sums + row);
      const __m256i shifted = _mm256_slli_epi32(_mm256_loadu_si256(values), 7);
      __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums[0], shifted));
      if constexpr (Bytes == 2) {
        sum = _mm256_fmadd_ps(sum, _mm256_set1_ps(256.0f), _mm256_cvtepi32_ps(sums[1]));
      }
      const __m256 scale = _mm256_maskz_loadu_ps(mask, a.scale + row);
      return _mm256_mul_ps(_mm256_mul_ps(sum, scale), _mm256_set1_ps(scales[token]));
    }

    // To add is a part of this, or the compiler decides in each kernel anew whether it rounds
    // twice.
    __m512 convert16(const __m512i (&sums)[Bytes], int64_t row, __mmask16 mask, int64_t token,
                     __m512 addend) const {
      const __m512i values = _mm512_loadu_si512(a.behind.value_sums + row);
      __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[0], _mm512_slli_epi32(values, 7)));
      if constexpr (Bytes == 2) {
        sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(sums[1]));
      }
      const __m512 scale = _mm512_maskz_loadu_ps(mask, a.scale + row);
      return _mm512_fmadd_ps(_mm512_mul_ps(sum, scale), _mm512_set1_ps(scales[token]), addend);
    }

    const LinearArguments& a;
    const float* scales;
  };
};

}  // namespace
}  // namespace permllm::cpu
