// AVX2 with AVX-VNNI: vpshufb decodes eight inputs at a time, by a table with an entry for every
// mask of eight.
#include <immintrin.h>

#include <array>

#include "int8_linear.h"

namespace permllm::cpu {
namespace {

// For every mask of eight inputs, which of four values each of them has.
constexpr std::array<uint64_t, 256> kPlaces = [] {
  constexpr uint64_t kZero = 0x80;
  std::array<uint64_t, 256> places{};
  for (uint64_t mask = 0; mask < 256; ++mask) {
    uint64_t value = 0;
    for (int input = 0; input < 8; ++input) {
      const bool kept = (mask >> input & 1) != 0;
      places[mask] |= (kept ? value : kZero) << (8 * input);
      value += kept;
    }
  }
  return places;
}();

struct Avx2Vnni {
  typedef int32_t Vector __attribute__((vector_size(32), may_alias));
  using Element = uint8_t;
  using Tuning = Avx2VnniTuning;
  static constexpr int kLanes = 8;

  // All 16 values are brought to both halves of the vector, for vpshufb crosses none.
  static Vector decode(const uint8_t* mask, const int8_t* values) {
    const __m256i starts =
        _mm256_set_epi64x(0x0c0c0c0c0c0c0c0c, 0x0808080808080808, 0x0404040404040404, 0);
    const auto place = [&](int i) { return static_cast<int64_t>(kPlaces[mask[i]]); };
    const __m256i places = _mm256_set_epi64x(place(3), place(2), place(1), place(0));
    const __m256i both =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    return (Vector)_mm256_shuffle_epi8(both, _mm256_or_si256(places, starts));
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
