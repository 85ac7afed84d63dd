// AVX2 without VNNI. Of sparse values, vpmaddubsw adds the products of two with 7 bits of x each,
// which 16 bits have room for; dense ones are widened to 16 bits, for vpmaddwd.
#include <immintrin.h>

#include "int8_linear.h"
#include "lanes_int8.h"

namespace permllm::cpu {
namespace {

typedef int32_t Lanes __attribute__((vector_size(32), may_alias));

struct Avx2 {
  using Vector = Lanes;
  using Tuning = Avx2Int8Tuning;
  static constexpr int kPartBits = 7;
  static constexpr bool kTogether = true;

  template <int Parts>
  static void multiply(Vector (&sums)[1], const char* x, __m256i places, __m256i values) {
    static_assert(Parts == 2);
    const __m256i upper = of_part(x, places, values, 1 << kPartBits);
    const __m256i lower = of_part(x + 8, places, values, 1);
    sums[0] = (Vector)_mm256_add_epi32((__m256i)sums[0], _mm256_add_epi32(upper, lower));
    // Else GCC 12 adds up a block's products in another order, for which registers are too few.
    __asm__("" : "+x"(sums[0]));
  }

 private:
  static __m256i of_part(const char* x, __m256i places, __m256i values, int16_t unit) {
    int64_t eight;
    __builtin_memcpy(&eight, x, sizeof(eight));
    const __m256i inputs = _mm256_shuffle_epi8(_mm256_set1_epi64x(eight), places);
    return _mm256_madd_epi16(_mm256_maddubs_epi16(inputs, values), _mm256_set1_epi16(unit));
  }
};

struct Avx2Dense {
  using Vector = Lanes;
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

template <int Of, class Real>
void avx2_int8(const LinearOf<Real>& a, Worker& worker) {
  int8_lanes<Avx2, Of, 2>(a, worker);
}

template <class Real>
void avx2_dense8(const LinearOf<Real>& a, Worker& worker) {
  int8_linear<Avx2Dense, dense8>(a, worker);
}

template void avx2_int8<4>(const LinearOf<bf16>&, Worker&);
template void avx2_int8<4>(const LinearOf<fp16>&, Worker&);
template void avx2_int8<8>(const LinearOf<bf16>&, Worker&);
template void avx2_int8<8>(const LinearOf<fp16>&, Worker&);
template void avx2_dense8(const LinearOf<bf16>&, Worker&);
template void avx2_dense8(const LinearOf<fp16>&, Worker&);

}  // namespace permllm::cpu
