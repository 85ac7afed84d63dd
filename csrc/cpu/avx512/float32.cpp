// AVX-512 without BF16 and VBMI2: values are widened to 32 bits, which AVX-512F can expand.
#include <immintrin.h>

#include "cpu/vector/float32_linear.h"

// The vector code comes last.
#include "cpu/avx512/registers.h"

namespace permllm::cpu {
namespace {

struct Avx512 {
  using Vector = __m512;
  using Tuning = Avx512Tuning;
  static constexpr int kLanes = 16;

  static Vector decode(const uint8_t* mask, const bf16* values) {
    const __m256i own = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    return _mm512_castsi512_ps(_mm512_slli_epi32(place(mask, _mm512_cvtepu16_epi32(own)), 16));
  }

  static Vector decode(const uint8_t* mask, const int8_t* values) {
    const __m128i own = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    return _mm512_cvtepi32_ps(place(mask, _mm512_cvtepi8_epi32(own)));
  }

 private:
  static __m512i place(const uint8_t* mask, __m512i values) {
    __mmask16 kept;
    __builtin_memcpy(&kept, mask, sizeof(kept));
    return _mm512_mask_expand_epi32(fresh_zero(), kept, values);
  }
};

}  // namespace

void avx512_float32(const LinearOf<bf16>& a, Worker& worker) { float32_linear<Avx512>(a, worker); }
void avx512_float32(const LinearOf<fp16>& a, Worker& worker) { float32_linear<Avx512>(a, worker); }
void avx512_float32(const LinearOf<float>& a, Worker& worker) { float32_linear<Avx512>(a, worker); }

}  // namespace permllm::cpu
