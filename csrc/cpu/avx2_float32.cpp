// AVX2 with FMA: vpshufb decodes eight inputs at a time, by a table with an entry for every mask of
// eight.
#include <immintrin.h>

#include "avx2_places.h"
#include "float32_linear.h"

namespace permllm::cpu {
namespace {

struct Avx2 {
  using Vector = __m256;
  using Tuning = Avx2Tuning;
  static constexpr int kLanes = 8;

  template <class Value>
  static constexpr float kUnit = sizeof(Value) == 1 ? 0x1p-24f : 1.0f;

  // The values are brought to both halves of the vector, for vpshufb crosses none. At the top of
  // its lane a bfloat16 is its float32, an int8 is itself times 2^24.
  static Vector decode(const uint8_t* mask, const bf16* values) {
    int64_t four;
    __builtin_memcpy(&four, values, sizeof(four));
    return _mm256_castsi256_ps(place<bf16>(*mask, _mm256_set1_epi64x(four)));
  }

  static Vector decode(const uint8_t* mask, const int8_t* values) {
    int32_t four;
    __builtin_memcpy(&four, values, sizeof(four));
    return _mm256_cvtepi32_ps(place<int8_t>(*mask, _mm256_set1_epi32(four)));
  }

 private:
  template <class Value>
  static __m256i place(uint8_t mask, __m256i values) {
    const auto* source = reinterpret_cast<const __m256i*>(kPlaces<Value, 4>.of[mask]);
    return _mm256_shuffle_epi8(values, _mm256_load_si256(source));
  }
};

}  // namespace

void avx2_float32(const LinearOf<bf16>& a, Worker& worker) { float32_linear<Avx2>(a, worker); }
void avx2_float32(const LinearOf<fp16>& a, Worker& worker) { float32_linear<Avx2>(a, worker); }
void avx2_float32(const LinearOf<float>& a, Worker& worker) { float32_linear<Avx2>(a, worker); }

}  // namespace permllm::cpu
