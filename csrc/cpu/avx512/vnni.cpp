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

  // The n-th of 16 inputs that is kept has the n-th of their eight values (pack.cpp gives other
  // masks to avx512). With a byte of 1 for those that are, a product with as many ones has n in
  // each of eight inputs, to which those of the eight before come in the second half of a quarter.
  // vpshufb crosses no quarter of the vector, to each of which its eight values are brought.
  static Vector decode(const uint8_t* mask, const int8_t* values) {
    uint64_t bits;
    __builtin_memcpy(&bits, mask, sizeof(bits));
    const __mmask64 kept = bits;
    const __m512i ones = _mm512_set1_epi8(1);
    const __m512i counts = _mm512_mullo_epi64(_mm512_maskz_mov_epi8(kept, ones), ones);
    constexpr int64_t kNone = -1, kLast = 0x0707070707070707;  // of a shuffle in a quarter
    const __m512i before =
        _mm512_shuffle_epi8(counts, _mm512_set4_epi64(kLast, kNone, kLast, kNone));
    const __m512i places = _mm512_add_epi8(_mm512_sub_epi8(counts, ones), before);
    const __m512i quarters = _mm512_permutexvar_epi64(
        _mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0),
        _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values))));
    return (Vector)_mm512_maskz_shuffle_epi8(kept, quarters, places);
  }

  static Vector widen(const int8_t* values) { return load<Vector>(values); }

  static Vector broadcast(uint32_t lane) {
    return (Vector)_mm512_set1_epi32(static_cast<int>(lane));
  }

  static Vector multiply(Vector sums, Vector x, Vector weights) {
    return (Vector)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)x, (__m512i)weights);
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
