// AVX-512 with VNNI, without VBMI2: where a value goes is counted in the mask, for all bytes at
// once.
#include <immintrin.h>

#include "cpu/vector/int8_linear.h"

namespace permllm::cpu {
namespace {

struct Avx512Vnni {
  typedef int32_t Vector __attribute__((vector_size(64), may_alias));
  using Element = uint8_t;
  using Tuning = Avx512VnniTuning;
  static constexpr int kLanes = 16;

  // The n-th input that is kept has the n-th value. With a byte of 1 for those that are, a product
  // with ones, but for the first, has in each byte how many there are before it of its eight
  // inputs, to which come those of the eights before. vpshufb crosses no quarter of the vector, to
  // each of which both halves of the values are brought.
  static Vector decode(const uint8_t* mask, const int8_t* values) {
    uint64_t bits;
    __builtin_memcpy(&bits, mask, sizeof(bits));
    const __mmask64 kept = bits;
    const uint64_t counts = kept_of_eights(bits);
    if (counts == kFourOfEights) [[likely]]
      return decode_four_of_eights(kept, values);
    const __m512i own =
        _mm512_mullo_epi64(_mm512_maskz_set1_epi8(kept, 1), _mm512_set1_epi64(0x0101010101010100));
    const __m512i eights = _mm512_set_epi64(
        0x0707070707070707, 0x0606060606060606, 0x0505050505050505, 0x0404040404040404,
        0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m512i before = _mm512_shuffle_epi8(
        _mm512_set1_epi64(static_cast<int64_t>(counts * 0x0101010101010101 << 8)), eights);
    const __m512i places = _mm512_add_epi8(own, before);
    const auto half = [&](int i) {
      return _mm512_broadcast_i32x4(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 16 * i)));
    };
    const __mmask64 upper = _mm512_test_epi8_mask(places, _mm512_set1_epi8(16)) & kept;
    const __m512i lower = _mm512_maskz_shuffle_epi8(kept, half(0), places);
    return (Vector)_mm512_mask_shuffle_epi8(lower, upper, half(1), places);
  }

  static Vector widen(const int8_t* values) { return load<Vector>(values); }

  static Vector broadcast(uint32_t lane) {
    return (Vector)_mm512_set1_epi32(static_cast<int>(lane));
  }

  static Vector multiply(Vector sums, Vector x, Vector weights) {
    return (Vector)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)x, (__m512i)weights);
  }

 private:
  // The same where a row keeps four of every eight inputs: a quarter has eight values, which are
  // brought to it.
  static Vector decode_four_of_eights(__mmask64 kept, const int8_t* values) {
    const __m512i own =
        _mm512_mullo_epi64(_mm512_maskz_set1_epi8(kept, 1), _mm512_set1_epi64(0x0101010101010100));
    const __m512i before = _mm512_set4_epi64(0x0404040404040404, 0, 0x0404040404040404, 0);
    const __m512i quarters = _mm512_permutexvar_epi64(
        _mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0),
        _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values))));
    return (Vector)_mm512_maskz_shuffle_epi8(kept, quarters, _mm512_add_epi8(own, before));
  }
};

}  // namespace

template <class Value, class Real>
void avx512_vnni(const LinearOf<Real>& a, Worker& worker) {
  int8_linear<Avx512Vnni, Value>(a, worker);
}

template void avx512_vnni<int8_t>(const LinearOf<bf16>&, Worker&);
template void avx512_vnni<int8_t>(const LinearOf<fp16>&, Worker&);
template void avx512_vnni<dense8>(const LinearOf<bf16>&, Worker&);
template void avx512_vnni<dense8>(const LinearOf<fp16>&, Worker&);

}  // namespace permllm::cpu
