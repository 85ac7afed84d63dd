// AVX2 without VNNI. vpmaddubsw adds two products in 16 bits, where one factor is unsigned. Of
// sparse values there is room for them with 7 bits of x, unsigned, two parts of which are W8A14; or
// with magnitudes of values, and 8 bits of x that take their signs (W8A8). Of values in 4 bits
// there is room for all of a block. Dense values are widened to 16 bits, for vpmaddwd.
#include <immintrin.h>

#include "cpu/vector/int8_linear.h"
#include "cpu/vector/lanes_int8.h"

namespace permllm::cpu {
namespace {

typedef uint32_t Words __attribute__((vector_size(32), may_alias));

// Else GCC 12 adds up a block's products in another order, for which registers are too few.
inline void in_order(Words& sums) { __asm__("" : "+x"(sums)); }

struct Avx2 {
  using Vector = Words;
  using Tuning = Avx2Int8Tuning;
  template <int Parts>
  static constexpr int kPartBits = Parts == 2 ? 7 : 8;
  template <int Parts>
  static constexpr bool kShifted = Parts == 2;
  static constexpr bool kOneSum = true;

  template <int Parts>
  static void multiply(Vector (&sums)[1], const char* x, __m256i places, __m256i values) {
    __m256i products;
    if constexpr (Parts == 2) {
      const __m256i upper = sum_products(pick(x, places), values, 1 << kPartBits<2>);
      const __m256i lower = sum_products(pick(x + kStepInputs, places), values, 1);
      products = _mm256_add_epi32(upper, lower);
    } else {
      const __m256i inputs = _mm256_sign_epi8(pick(x, places), values);
      products = sum_products(_mm256_abs_epi8(values), inputs, 1);
    }
    sums[0] = (Vector)_mm256_add_epi32((__m256i)sums[0], products);
    in_order(sums[0]);
  }

 private:
  static __m256i sum_products(__m256i without_sign, __m256i with_sign, int16_t unit) {
    const __m256i pairs = _mm256_maddubs_epi16(without_sign, with_sign);
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(unit));
  }
};

struct Avx2Quotients {
  using Vector = Words;
  using Tuning = Avx2Int4Tuning;
  template <int>
  static constexpr int kPartBits = 8;
  template <int>
  static constexpr bool kShifted = true;
  static constexpr bool kOneSum = false;
  static_assert(2 * kFours * 255 * 8 <= INT16_MAX);

  template <int Parts>
  static void multiply(Vector (&sums)[Parts], const char* x, __m256i places, __m256i quotients) {
    PERMLLM_UNROLL
    for (int part = 0; part < Parts; ++part) {
      const __m256i pairs = _mm256_maddubs_epi16(pick(x + kStepInputs * part, places), quotients);
      sums[part] = (Vector)_mm256_add_epi16((__m256i)sums[part], pairs);
      in_order(sums[part]);
    }
  }

  // In both halves of their lanes.
  static __m256i multipliers(const uint8_t* bytes) {
    const __m256i rows = widen_rows(bytes);
    return _mm256_or_si256(rows, _mm256_slli_epi32(rows, 16));
  }

  static Vector multiplied(Vector sums, __m256i multipliers) {
    return (Vector)_mm256_madd_epi16((__m256i)sums, multipliers);
  }
};

struct Avx2Dense {
  using Vector = Words;
  using Element = int16_t;
  using Tuning = Avx2Int8Tuning;
  static constexpr int kLanes = 8;

  static Vector widen(const int8_t* values) {
    return (Vector)_mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(values)));
  }

  static Vector broadcast(uint32_t lane) {
    return (Vector)_mm256_set1_epi32(static_cast<int>(lane));
  }

  static Vector multiply(Vector sums, Vector x, Vector weights) {
    const __m256i products = _mm256_madd_epi16((__m256i)weights, (__m256i)x);
    return (Vector)_mm256_add_epi32((__m256i)sums, products);
  }
};

}  // namespace

template <class Value, int Of, class Real>
void avx2_int8(const LinearOf<Real>& a, Worker& worker) {
  using Isa = std::conditional_t<std::is_same_v<Value, int4>, Avx2Quotients, Avx2>;
  int8_lanes<Isa, Value, Of>(a, worker);
}

template <class Real>
void avx2_dense8(const LinearOf<Real>& a, Worker& worker) {
  int8_linear<Avx2Dense, dense8>(a, worker);
}

template void avx2_int8<int8_t, 4>(const LinearOf<bf16>&, Worker&);
template void avx2_int8<int8_t, 4>(const LinearOf<fp16>&, Worker&);
template void avx2_int8<int8_t, 16>(const LinearOf<bf16>&, Worker&);
template void avx2_int8<int8_t, 16>(const LinearOf<fp16>&, Worker&);
template void avx2_int8<int4, 4>(const LinearOf<bf16>&, Worker&);
template void avx2_int8<int4, 4>(const LinearOf<fp16>&, Worker&);
template void avx2_int8<int4, 16>(const LinearOf<bf16>&, Worker&);
template void avx2_int8<int4, 16>(const LinearOf<fp16>&, Worker&);
template void avx2_dense8(const LinearOf<bf16>&, Worker&);
template void avx2_dense8(const LinearOf<fp16>&, Worker&);

}  // namespace permllm::cpu
