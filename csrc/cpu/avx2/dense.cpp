// AVX2 for the rows of the output head, which are widened to float32.
#include "cpu/dense.h"

#include <immintrin.h>

#include "cpu/vector/float32_linear.h"

namespace permllm::cpu {
namespace {

struct Avx2 {
  using Vector = __m256;
  using Tuning = Avx2Tuning;
  static constexpr int kLanes = 8;

  static Vector widen(const bf16* values) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight(values)), 16));
  }

  static Vector widen(const fp16* values) { return _mm256_cvtph_ps(eight(values)); }

 private:
  template <class Value>
  static __m128i eight(const Value* values) {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(values));
  }
};

// The same call, its words of 16 bits as float16.
LinearOf<fp16> in_halves(const LinearArguments& a) {
  LinearOf<fp16> same{};
  same.x = reinterpret_cast<const fp16*>(a.x);
  same.x_stride = a.x_stride;
  same.m = a.m;
  same.packed = a.packed;
  same.n = a.n;
  same.k = a.k;
  same.y = reinterpret_cast<fp16*>(a.y);
  same.packed_x = a.packed_x;
  same.last = a.last;
  return same;
}

}  // namespace

void avx2_dense(const LinearArguments& a, Worker& worker) {
  a.half ? float32_dense<DenseProducts<Avx2, fp16>>(in_halves(a), worker)
         : float32_dense<DenseProducts<Avx2, bf16>>(a, worker);
}

}  // namespace permllm::cpu
