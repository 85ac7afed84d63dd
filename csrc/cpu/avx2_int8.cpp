// AVX2 without VNNI: values are widened to 16 bits, for vpmaddwd.
#include <immintrin.h>

#include "int8_linear.h"

namespace permllm::cpu {
namespace {

// For every mask of eight inputs, where the bytes of eight lanes of 16 bits come from. A value goes
// to the upper byte of its lane.
struct Places {
  static constexpr uint8_t kZero = 0x80;

  constexpr Places() {
    for (int mask = 0; mask < 256; ++mask) {
      uint8_t value = 0;
      for (int input = 0; input < 8; ++input) {
        const bool kept = (mask >> input & 1) != 0;
        source[mask][2 * input] = kZero;
        source[mask][2 * input + 1] = kept ? value : kZero;
        value += kept;
      }
    }
  }

  alignas(16) uint8_t source[256][16] = {};
};

constexpr Places kPlaces;

struct Avx2 {
  typedef int32_t Vector __attribute__((vector_size(32), may_alias));
  using Element = int16_t;
  using Tuning = Avx2Int8Tuning;
  static constexpr int kLanes = 8;

  // All eight values are brought to both halves of the vector, for vpshufb crosses none.
  static Vector decode(const uint8_t* mask, const int8_t* values) {
    const __m256i starts = _mm256_set_epi64x(0x0404040404040404, 0x0404040404040404, 0, 0);
    int64_t eight;
    __builtin_memcpy(&eight, values, sizeof(eight));
    const auto place = [&](int i) {
      return _mm_load_si128(reinterpret_cast<const __m128i*>(kPlaces.source[mask[i]]));
    };
    const __m256i places = _mm256_inserti128_si256(_mm256_castsi128_si256(place(0)), place(1), 1);
    const __m256i words =
        _mm256_shuffle_epi8(_mm256_set1_epi64x(eight), _mm256_or_si256(places, starts));
    return (Vector)_mm256_srai_epi16(words, 8);
  }

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

template <class Value, class Real>
void avx2_int8(const LinearOf<Real>& a, Worker& worker) {
  int8_linear<Avx2, Value>(a, worker);
}

template void avx2_int8<int8_t>(const LinearOf<bf16>&, Worker&);
template void avx2_int8<int8_t>(const LinearOf<fp16>&, Worker&);
template void avx2_int8<dense8>(const LinearOf<bf16>&, Worker&);
template void avx2_int8<dense8>(const LinearOf<fp16>&, Worker&);

}  // namespace permllm::cpu
