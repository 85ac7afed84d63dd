// AVX2 with AVX-VNNI: vpdpbusd adds the products of four values with 8 bits of x each.
#include <immintrin.h>

#include "cpu/vector/int8_linear.h"
#include "cpu/vector/lanes_int8.h"

namespace permllm::cpu {
namespace {

typedef uint32_t Words __attribute__((vector_size(32), may_alias));

struct Avx2Vnni {
  using Vector = Words;
  using Tuning = Avx2VnniTuning;
  template <int>
  static constexpr int kPartBits = 8;
  template <int>
  static constexpr bool kShifted = true;
  static constexpr bool kOneSum = false;

  template <int Parts>
  static void multiply(Vector (&sums)[Parts], const char* x, __m256i places, __m256i values) {
    PERMLLM_UNROLL
    for (int part = 0; part < Parts; ++part) {
      const __m256i inputs = pick(x + kStepInputs * part, places);
      sums[part] = (Vector)_mm256_dpbusd_avx_epi32((__m256i)sums[part], inputs, values);
    }
  }
};

struct Avx2VnniQuotients : Avx2Vnni {
  using Tuning = Avx2VnniInt4Tuning;

  static Vector multipliers(const uint8_t* bytes) { return (Vector)widen_rows(bytes); }
  static Vector multiplied(Vector sums, Vector multipliers) { return sums * multipliers; }
};

struct Avx2VnniDense {
  using Vector = Words;
  using Element = uint8_t;
  using Tuning = Avx2VnniTuning;
  static constexpr int kLanes = 8;

  static Vector widen(const int8_t* values) { return load<Vector>(values); }

  static Vector broadcast(uint32_t lane) {
    return (Vector)_mm256_set1_epi32(static_cast<int>(lane));
  }

  static Vector multiply(Vector sums, Vector x, Vector weights) {
    return (Vector)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)x, (__m256i)weights);
  }
};

}  // namespace

template <class Value, int Of, class Real>
void avx2_vnni_int8(const LinearOf<Real>& a, Worker& worker) {
  using Isa = std::conditional_t<std::is_same_v<Value, int4>, Avx2VnniQuotients, Avx2Vnni>;
  int8_lanes<Isa, Value, Of>(a, worker);
}

template <class Real>
void avx2_vnni_dense8(const LinearOf<Real>& a, Worker& worker) {
  int8_linear<Avx2VnniDense, dense8>(a, worker);
}

template void avx2_vnni_int8<int8_t, 4>(const LinearOf<bf16>&, Worker&);
template void avx2_vnni_int8<int8_t, 4>(const LinearOf<fp16>&, Worker&);
template void avx2_vnni_int8<int8_t, 16>(const LinearOf<bf16>&, Worker&);
template void avx2_vnni_int8<int8_t, 16>(const LinearOf<fp16>&, Worker&);
template void avx2_vnni_int8<int4, 4>(const LinearOf<bf16>&, Worker&);
template void avx2_vnni_int8<int4, 4>(const LinearOf<fp16>&, Worker&);
template void avx2_vnni_int8<int4, 16>(const LinearOf<bf16>&, Worker&);
template void avx2_vnni_int8<int4, 16>(const LinearOf<fp16>&, Worker&);
template void avx2_vnni_dense8(const LinearOf<bf16>&, Worker&);
template void avx2_vnni_dense8(const LinearOf<fp16>&, Worker&);

}  // namespace permllm::cpu
