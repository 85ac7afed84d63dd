// AVX2 with FMA: products of float32, of values in lanes and with masks.
#include <immintrin.h>

#include <type_traits>

#include "cpu/avx2/lanes.h"
#include "cpu/vector/float32_linear.h"
#include "cpu/vector/lanes.h"

namespace permllm::cpu {
namespace {

// At the top of its lane a bfloat16 is its float32, an int8 is itself times 2^24.
template <class Value>
constexpr float kUnit = std::is_same_v<Value, bf16> ? 1.0f : 0x1p-24f;

// One of four values of every row of a block.
template <int Of>
inline __m256 values_of(BlocksOf<LaneBlock<bf16, Of>> place, int four, int value) {
  const __m256i both = load_bits((*place).values[four][value / 2]);
  return _mm256_castsi256_ps(value % 2 == 0
                                 ? _mm256_slli_epi32(both, 16)
                                 : _mm256_and_si256(both, _mm256_set1_epi32(0xffff0000)));
}

inline __m256 values_of(__m256i bytes, int value) {
  const __m256i own = _mm256_slli_epi32(bytes, 24 - 8 * value);
  return _mm256_cvtepi32_ps(_mm256_and_si256(own, _mm256_set1_epi32(0xff000000)));
}

template <int Of>
inline __m256 values_of(BlocksOf<LaneBlock<int8_t, Of>> place, int four, int value) {
  return values_of(bytes_of(*place, four), value);
}

template <int Of>
inline __m256 values_of(MultipliedBlocksOf<LaneBlock<int4, Of>> place, int four, int value) {
  const __m256i multipliers = widen_rows(place.multipliers());
  return values_of(bytes_of(*place, four), value) * _mm256_cvtepi32_ps(multipliers);
}

// What brings inputs to one of four values of every row.
template <int Of>
struct Pick;

template <>
struct Pick<4> {
  Pick() = default;
  Pick(const LoadedPlaces<4>& loaded, int, int value) : places(loaded.lanes(value)) {}

  __m256 operator()(const float* inputs) const {
    return _mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(inputs)),
                                places);
  }

  __m256i places;
};

// Value s of 16 inputs is that of input s or one of the eight behind it. The last of these nine has
// the fourth bit of its place alone.
template <>
struct Pick<16> {
  Pick() = default;
  Pick(const LoadedPlaces<16>& loaded, int four, int value)
      : places(loaded.lanes(value)),
        ninth(_mm256_castsi256_ps(loaded.upper_lanes(value))),
        first(four % 2 * kLaneValues + value) {}

  __m256 operator()(const float* inputs) const {
    const __m256 eight = _mm256_permutevar8x32_ps(_mm256_loadu_ps(inputs + first), places);
    return _mm256_blendv_ps(eight, _mm256_broadcast_ss(inputs + first + 8), ninth);
  }

  __m256i places;
  __m256 ninth;
  int first;
};

// As lanes.h asks for them.
template <class Value, int Of>
struct FloatLanes {
  using Weights = BlocksInLanes<Value, Of>;
  using Vector = __m256;
  using Lane = float;
  static constexpr int kSums = 1;
  template <int Tokens>
  static constexpr int kChains = Tokens == 1                  ? 4
                                 : Tokens < (Of == 4 ? 4 : 5) ? 2
                                                              : 1;
  static constexpr int kSteps = kBlockInputs / Of, kStepBytes = Of * sizeof(float);

  // Values that meet an input side by side: those of four share a load of x.
  static constexpr int kTogether = Of == 4 ? 2 : 1;

  template <int Tokens, int Chains>
  static inline void multiply(Weights place, const char* x, Vector (&sums)[Tokens][Chains][1]) {
    PERMLLM_UNROLL
    for (int four = 0; four < kFours; ++four) {
      const LoadedPlaces<Of> places(*place, four);
      PERMLLM_UNROLL
      for (int value = 0; value < kLaneValues; value += kTogether) {
        const int step = (kLaneValues * four + value) * 2 / Of;
        Vector values[kTogether];
        Pick<Of> picks[kTogether];
        PERMLLM_UNROLL
        for (int i = 0; i < kTogether; ++i) {
          values[i] = values_of(place, four, value + i);
          picks[i] = Pick<Of>(places, four, value + i);
        }
        PERMLLM_UNROLL
        for (int t = 0; t < Tokens; ++t) {
          const auto* inputs = reinterpret_cast<const float*>(x + (step * Tokens + t) * kStepBytes);
          PERMLLM_UNROLL
          for (int i = 0; i < kTogether; ++i) {
            Vector& sum = sums[t][(value + i) % Chains][0];
            sum = _mm256_fmadd_ps(values[i], picks[i](inputs), sum);
          }
        }
      }
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
    for (int four = 0; four < kFours; ++four) {
      const LoadedPlaces<Of> places(*place, four);
      PERMLLM_UNROLL
      for (int value = 0; value < kLaneValues; ++value) {
        const int i = kLaneValues * four + value;
        store(decoded.values[i], values_of(place, four, value));
        const __m256i bytes = _mm256_set1_epi32(sizeof(Vector));
        store(decoded.places[i], _mm256_mullo_epi32(places.inputs(value), bytes));
      }
    }
  }
};

// Of blocks with masks, as vector/float32.h asks for it.
struct Avx2 {
  using Vector = __m256;
  using Tuning = Avx2Tuning;
  static constexpr int kLanes = 8;

  static Vector decode(const uint8_t* mask, const bf16* values) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    return place(*mask, _mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
  }

  static Vector decode(const uint8_t* mask, const int8_t* values) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
    const __m256 floats = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
    return place(*mask, _mm256_castps_si256(floats));
  }

 private:
  // The n-th of eight inputs that is kept has the n-th value.
  static Vector place(uint8_t mask, __m256i values) {
    const uint64_t kept = _pdep_u64(mask, 0x0101010101010101) * 0xff;
    const auto places = static_cast<int64_t>(_pdep_u64(0x0706050403020100, kept));
    const auto lanes = static_cast<int64_t>(kept);
    const __m256i placed =
        _mm256_permutevar8x32_epi32(values, _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(places)));
    return _mm256_castsi256_ps(
        _mm256_and_si256(placed, _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(lanes))));
  }
};

}  // namespace

template <class Value, int Of, class Real>
void avx2_float32(const LinearOf<Real>& a, Worker& worker) {
  static_assert(Avx2Tuning::kPackedTokens == Float32Tuning::kPackedTokens, "packed_x is as large");
  constexpr int kFew = Of == 4 ? Avx2Tuning::kLaneFewTokensOf4 : Avx2Tuning::kLaneFewTokensOf16;
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
PERMLLM_FOR_EVERY_REAL(bf16, 16)
PERMLLM_FOR_EVERY_REAL(int8_t, 4)
PERMLLM_FOR_EVERY_REAL(int8_t, 16)
PERMLLM_FOR_EVERY_REAL(int4, 4)
PERMLLM_FOR_EVERY_REAL(int4, 16)

void avx2_masks(const LinearOf<bf16>& a, Worker& worker) { float32_linear<Avx2>(a, worker); }
void avx2_masks(const LinearOf<fp16>& a, Worker& worker) { float32_linear<Avx2>(a, worker); }
void avx2_masks(const LinearOf<float>& a, Worker& worker) { float32_linear<Avx2>(a, worker); }

}  // namespace permllm::cpu
