// AVX2 with AVX-VNNI: vpshufb decodes eight inputs at a time, by a table with an entry for every
// mask of eight.
#include <immintrin.h>

#include "avx2_places.h"
#include "int8_linear.h"

namespace permllm::cpu {
namespace {

struct Avx2Vnni {
  typedef int32_t Vector __attribute__((vector_size(32), may_alias));
  using Element = uint8_t;
  using Tuning = Avx2VnniTuning;
  static constexpr int kLanes = 8;

  // All 16 values are brought to both halves of the vector, for vpshufb crosses none.
  static Vector decode(const uint8_t* mask, const int8_t* values) {
    const __m256i starts =
        _mm256_set_epi64x(0x0c0c0c0c0c0c0c0c, 0x0808080808080808, 0x0404040404040404, 0);
    const __m256i own =
        _mm256_set_epi64x(places(mask[3]), places(mask[2]), places(mask[1]), places(mask[0]));
    const __m256i both =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    return (Vector)_mm256_shuffle_epi8(both, _mm256_or_si256(own, starts));
  }

  static Vector widen(const int8_t* values) { return load<Vector>(values); }

  static Vector broadcast(uint32_t lane) {
    return (Vector)_mm256_set1_epi32(static_cast<int>(lane));
  }

  static Vector multiply(Vector sums, Vector x, Vector weights) {
    return (Vector)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)x, (__m256i)weights);
  }
};

}  // namespace

template <class Value, class Real>
void avx2_vnni(const LinearOf<Real>& a, Worker& worker) {
  int8_linear<Avx2Vnni, Value>(a, worker);
}

template void avx2_vnni<int8_t>(const LinearOf<bf16>&, Worker&);
template void avx2_vnni<int8_t>(const LinearOf<fp16>&, Worker&);
template void avx2_vnni<dense8>(const LinearOf<bf16>&, Worker&);
template void avx2_vnni<dense8>(const LinearOf<fp16>&, Worker&);

}  // namespace permllm::cpu
