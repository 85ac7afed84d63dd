// AVX2 without VNNI: values are widened to 16 bits, for vpmaddwd.
#include <immintrin.h>

#include "avx2_places.h"
#include "int8_linear.h"

namespace permllm::cpu {
namespace {

struct Avx2 {
  typedef int32_t Vector __attribute__((vector_size(32), may_alias));
  using Element = int16_t;
  using Tuning = Avx2Int8Tuning;
  static constexpr int kLanes = 8;

  static Vector decode(const uint8_t* mask, const int8_t* values) {
    const __m128i starts = _mm_set_epi64x(0x0404040404040404, 0);
    const __m128i own = _mm_set_epi64x(places(mask[1]), places(mask[0]));
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
    return widened(_mm_shuffle_epi8(eight, _mm_or_si128(own, starts)));
  }

  static Vector widen(const int8_t* values) {
    return widened(_mm_load_si128(reinterpret_cast<const __m128i*>(values)));
  }

  static Vector broadcast(uint32_t lane) {
    return (Vector)_mm256_set1_epi32(static_cast<int>(lane));
  }

  static Vector multiply(Vector sums, Vector x, Vector weights) {
    const __m256i products = _mm256_madd_epi16((__m256i)weights, (__m256i)x);
    return (Vector)_mm256_add_epi32((__m256i)sums, products);
  }

 private:
  static Vector widened(__m128i bytes) { return (Vector)_mm256_cvtepi8_epi16(bytes); }
};

}  // namespace

template <class Value, class Real>
void avx2_int8(const LinearOf<Real>& a, Worker& worker) {
  int8_linear<Avx2, Value>(a, worker);
}

template void avx2_int8<int8_t>(const LinearOf<bf16>&, Worker&);
template void avx2_int8<int8_t>(const LinearOf<fp16>&, Worker&);
template void avx2_int8<dense8>(const LinearOf<bf16>&, Worker&);
template void avx2_int8<dense8>(const LinearOf<fp16>&, Worker&);

}  // namespace permllm::cpu
