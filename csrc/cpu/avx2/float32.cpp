// AVX2 with FMA: products of float32, of values in lanes.
#include "cpu/vector/float32.h"

#include <immintrin.h>

#include <type_traits>

#include "cpu/avx2/lanes.h"
#include "cpu/vector/kept.h"
#include "cpu/vector/lanes.h"

namespace permllm::cpu {
namespace {

// At the top of its lane a bfloat16 is its float32, an int8 is itself times 2^24.
template <class Value>
constexpr float kUnit = std::is_same_v<Value, bf16> ? 1.0f : 0x1p-24f;

// The values of a slot, of inputs 8 eight.. of a block.
template <int Of>
inline __m256 values_of(BlocksOf<LaneBlock<bf16, Of>> place, int eight, int slot) {
  const __m256i both = load_bits((*place).values[eight][slot / 2]);
  return _mm256_castsi256_ps(slot % 2 == 0 ? _mm256_slli_epi32(both, 16)
                                           : _mm256_and_si256(both, _mm256_set1_epi32(0xffff0000)));
}

inline __m256 values_of(__m256i bytes, int slot) {
  const __m256i four = _mm256_slli_epi32(bytes, 24 - 8 * slot);
  return _mm256_cvtepi32_ps(_mm256_and_si256(four, _mm256_set1_epi32(0xff000000)));
}

template <int Of>
inline __m256 values_of(BlocksOf<LaneBlock<int8_t, Of>> place, int eight, int slot) {
  return values_of(bytes_of(*place, eight), slot);
}

template <int Of>
inline __m256 values_of(MultipliedBlocksOf<LaneBlock<int4, Of>> place, int eight, int slot) {
  const __m256i multipliers = widen_rows(place.multipliers());
  return values_of(bytes_of(*place, eight), slot) * _mm256_cvtepi32_ps(multipliers);
}

// As lanes.h asks for them.
template <class Value, int Of>
struct FloatLanes {
  using Weights = BlocksInLanes<Value, Of>;
  using Vector = __m256;
  using Lane = float;
  static constexpr int kSums = 1;
  template <int Tokens>
  static constexpr int kChains = Tokens == 1  ? 4
                                 : Tokens < 4 ? 2
                                              : 1;
  static constexpr int kSteps = kBlockInputs / Of, kStepBytes = Of * sizeof(float);

  template <int Tokens, int Chains>
  static inline void multiply(Weights place, const char* x, Vector (&sums)[Tokens][Chains][1]) {
    PERMLLM_UNROLL
    for (int eight = 0; eight < kEights; ++eight) {
      const LoadedPlaces<Of> places(*place, eight);
      PERMLLM_UNROLL
      for (int slot = 0; slot < kSlots; slot += 2) {
        const Vector first = values_of(place, eight, slot);
        const Vector second = values_of(place, eight, slot + 1);
        const __m256i of_first = places.lanes(slot), of_second = places.lanes(slot + 1);
        const int step = Of == 4 ? 2 * eight + slot / 2 : eight;
        PERMLLM_UNROLL
        for (int t = 0; t < Tokens; ++t) {
          const auto* inputs = reinterpret_cast<const float*>(x + (step * Tokens + t) * kStepBytes);
          Vector& even = sums[t][slot % Chains][0];
          even = _mm256_fmadd_ps(first, pick(inputs, of_first), even);
          Vector& odd = sums[t][(slot + 1) % Chains][0];
          odd = _mm256_fmadd_ps(second, pick(inputs, of_second), odd);
        }
      }
    }
  }

 private:
  static Vector pick(const float* inputs, __m256i places) {
    if constexpr (Of == 4) {
      return _mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(inputs)),
                                  places);
    } else {
      return _mm256_permutevar8x32_ps(_mm256_load_ps(inputs), places);
    }
  }
};

template <class Value, int Of, class RealType>
struct LaneFloatProducts {
  using Tuning = Avx2Tuning;
  using Real = RealType;
  using Lanes = FloatLanes<Value, Of>;

  struct Inputs : Float32Inputs<Real> {
    using Float32Inputs<Real>::Float32Inputs;

    void load(int64_t token, int64_t block, char* bytes) const {
      Float32Inputs<Real>::load(token, block, reinterpret_cast<float*>(bytes));
    }
  };

  struct Outputs : Float32Outputs<Real> {
    Outputs(const LinearOf<Real>& a, const Inputs&, int64_t group)
        : Float32Outputs<Real>(a, group, kUnit<Value>) {}
  };
};

// As vector/kept.h asks for them.
template <class Value, int Of>
struct KeptLanes {
  using Weights = BlocksInLanes<Value, Of>;
  using Vector = __m256;
  using Tuning = Avx2Tuning;
  static constexpr int kLanes = 8;
  static constexpr float kUnit = cpu::kUnit<Value>;

  struct Decoded {
    alignas(64) float values[kBlockValues][kRows];
    alignas(64) uint32_t places[kBlockValues][kRows];

    float value(int row, int i) const { return values[i][row]; }
    uint32_t place(int row, int i) const { return places[i][row]; }
  };

  static void decode(Weights place, Decoded& decoded) {
    PERMLLM_UNROLL
    for (int eight = 0; eight < kEights; ++eight) {
      const LoadedPlaces<Of> places(*place, eight);
      PERMLLM_UNROLL
      for (int slot = 0; slot < kSlots; ++slot) {
        const int i = kSlots * eight + slot;
        store(decoded.values[i], values_of(place, eight, slot));
        const int first = 8 * eight + (Of == 4 ? 4 * (slot / 2) : 0);
        const __m256i among = _mm256_and_si256(places.lanes(slot), _mm256_set1_epi32(Of - 1));
        const __m256i input = _mm256_add_epi32(among, _mm256_set1_epi32(first));
        store(decoded.places[i], _mm256_mullo_epi32(input, _mm256_set1_epi32(sizeof(Vector))));
      }
    }
  }
};

}  // namespace

template <class Value, int Of, class Real>
void avx2_float32(const LinearOf<Real>& a, Worker& worker) {
  static_assert(Avx2Tuning::kPackedTokens == Float32Tuning::kPackedTokens, "packed_x is as large");
  constexpr int kFew = Of == 4 ? Avx2Tuning::kLaneFewTokensOf4 : Avx2Tuning::kLaneFewTokensOf8;
  if (a.m <= kFew) {
    go_through(LaneTokens<LaneFloatProducts<Value, Of, Real>>(a), a.last, worker);
  } else {
    go_through_parts<KeptTokens<KeptLanes<Value, Of>, Real>>(a, worker);
  }
}

#define PERMLLM_FOR_EVERY_REAL(Value, Of)                                \
  template void avx2_float32<Value, Of>(const LinearOf<bf16>&, Worker&); \
  template void avx2_float32<Value, Of>(const LinearOf<fp16>&, Worker&); \
  template void avx2_float32<Value, Of>(const LinearOf<float>&, Worker&);

PERMLLM_FOR_EVERY_REAL(bf16, 4)
PERMLLM_FOR_EVERY_REAL(bf16, 8)
PERMLLM_FOR_EVERY_REAL(int8_t, 4)
PERMLLM_FOR_EVERY_REAL(int8_t, 8)
PERMLLM_FOR_EVERY_REAL(int4, 4)
PERMLLM_FOR_EVERY_REAL(int4, 8)

}  // namespace permllm::cpu
