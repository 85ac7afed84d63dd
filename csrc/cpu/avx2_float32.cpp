// AVX2 with FMA: vpshufb decodes eight inputs at a time, by a table with an entry for every mask of
// eight.
#include <immintrin.h>

#include "float32_linear.h"

namespace permllm::cpu {
namespace {

// For every mask of eight inputs, where the bytes of eight lanes come from. A value goes to the top
// of its lane: a bfloat16 there is its float32, an int8 is itself times 2^24.
template <class Value>
struct Places {
  static constexpr uint8_t kZero = 0x80;

  constexpr Places() {
    for (int mask = 0; mask < 256; ++mask) {
      int value = 0;
      for (int lane = 0; lane < 8; ++lane) {
        const bool kept = (mask >> lane & 1) != 0;
        for (int byte = 0; byte < 4; ++byte) {
          const int of_value = byte - (4 - static_cast<int>(sizeof(Value)));
          source[mask][lane * 4 + byte] =
              kept && of_value >= 0 ? static_cast<uint8_t>(value * sizeof(Value) + of_value)
                                    : kZero;
        }
        value += kept;
      }
    }
  }

  alignas(32) uint8_t source[256][32] = {};
};

template <class Value>
constexpr Places<Value> kPlaces;

struct Avx2 {
  using Vector = __m256;
  using Tuning = Avx2Tuning;
  static constexpr int kLanes = 8;

  template <class Value>
  static constexpr float kUnit = sizeof(Value) == 1 ? 0x1p-24f : 1.0f;

  // The values are brought to both halves of the vector, for vpshufb crosses none.
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
    const auto* source = reinterpret_cast<const __m256i*>(kPlaces<Value>.source[mask]);
    return _mm256_shuffle_epi8(values, _mm256_load_si256(source));
  }
};

}  // namespace

void avx2_float32(const LinearOf<bf16>& a, Worker& worker) { float32_linear<Avx2>(a, worker); }
void avx2_float32(const LinearOf<fp16>& a, Worker& worker) { float32_linear<Avx2>(a, worker); }
void avx2_float32(const LinearOf<float>& a, Worker& worker) { float32_linear<Avx2>(a, worker); }

}  // namespace permllm::cpu
