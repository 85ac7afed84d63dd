// int8 values in lanes (layout.h), of 8 bits or 4: integer products, summed in lanes of 32 bits.
//
// x is rounded to integers of one or two parts of 7 or 8 bits, shifted to be unsigned where the
// instruction set asks for that. Each part meets the values that its inputs are brought to.
//
// Templates over an instruction set, a struct with
//   Vector               unsigned 32-bit integers, a type of the compiler's: sums wrap before what
//                        shifted x adds to them is taken off
//   Tuning               its constants (tuning.h)
//   kPartBits<Parts>     of an integer of so many parts
//   kShifted<Parts>      whether it is unsigned
//   kOneSum              whether the parts of a token have one sum, where `multiply` weights the
//                        upper one by 2^kPartBits
//   multiply(sums, x, places, values) adds products to the sums of a token, of x of 16 inputs in
//                        each part
// and one for values in 4 bits, whose `multiply` adds what multipliers have not met yet, of a
// block, which has room for that, and which has
//   multipliers(bytes)   of the rows of a block
//   multiplied(sums, multipliers)
//
// Include after every other header: what follows is compiled for one instruction set.
#pragma once

#include <type_traits>

#include "cpu/vector/int8.h"
#include "cpu/vector/lanes.h"
// The vector code comes last.
#include "cpu/avx2/lanes.h"

namespace permllm::cpu {
namespace {

// Inputs of a step of x, to which a place takes four bits.
constexpr int kStepInputs = 16;

// As many inputs, brought to the places of all bytes.
inline __m256i pick(const char* x, __m256i places) {
  const __m128i inputs = _mm_load_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(inputs), places);
}

template <class Isa, class Value, int Of, int Parts>
struct IntegerLanes {
  using Weights = BlocksInLanes<Value, Of>;
  using Vector = typename Isa::Vector;
  using Lane = uint32_t;  // which wraps: `packed` may hold anything
  static constexpr int kSums = Isa::kOneSum ? 1 : Parts;
  template <int Tokens>
  static constexpr int kChains = Tokens == 1 ? 2 : 1;
  static constexpr int kSteps = kBlockInputs / kStepInputs, kStepBytes = kStepInputs * Parts;

  template <int Tokens, int Chains>
  static inline void multiply(Weights place, const char* x, Vector (&sums)[Tokens][Chains][kSums]) {
    if constexpr (std::is_same_v<Value, int4>) {
      Vector own[Tokens][1][kSums] = {};
      multiply_bytes(*place, x, own);
      const auto factors = Isa::multipliers(place.multipliers());
      PERMLLM_UNROLL
      for (int t = 0; t < Tokens; ++t) {
        PERMLLM_UNROLL
        for (int p = 0; p < kSums; ++p) sums[t][0][p] += Isa::multiplied(own[t][0][p], factors);
      }
    } else {
      multiply_bytes(*place, x, sums);
    }
  }

 private:
  template <int Tokens, int Chains>
  static inline void multiply_bytes(const typename Weights::Block& block, const char* x,
                                    Vector (&sums)[Tokens][Chains][kSums]) {
    PERMLLM_UNROLL
    for (int four = 0; four < kFours; ++four) {
      const __m256i places = LoadedPlaces<Of>(block, four).bytes();
      const __m256i values = bytes_of(block, four);
      const int step = four * kSteps / kFours;
      PERMLLM_UNROLL
      for (int t = 0; t < Tokens; ++t) {
        const char* inputs = x + (step * Tokens + t) * kStepBytes;
        Isa::template multiply<Parts>(sums[t][four % Chains], inputs, places, values);
      }
    }
  }
};

// As lanes.h asks for them.
template <class Isa, class Value, int Of, int Parts, class RealType>
struct IntegerProducts {
  using Tuning = typename Isa::Tuning;
  using Real = RealType;
  using Lanes = IntegerLanes<Isa, Value, Of, Parts>;
  static constexpr int kPartBits = Isa::template kPartBits<Parts>;
  static constexpr bool kShifted = Isa::template kShifted<Parts>;
  // Magnitudes are below it; added, it makes them unsigned.
  static constexpr uint32_t kRange = 1u << (Parts * kPartBits - 1);
  static constexpr uint32_t kShift = kShifted ? kRange : 0;

  struct Inputs : IntegerInputs<Real> {
    explicit Inputs(const LinearOf<Real>& a) : IntegerInputs<Real>(a, largest(a.k), a.m) {}

    // [step][part][input], the upper part first.
    void load(int64_t token, int64_t block, char* bytes) const {
      alignas(16) uint16_t shifted[kBlockInputs];
      this->round(token, block, kShift, shifted);
      const auto eight = [&](int i) {
        return _mm_load_si128(reinterpret_cast<const __m128i*>(shifted + 8 * i));
      };
      const __m128i mask = _mm_set1_epi16((1 << kPartBits) - 1);
      PERMLLM_UNROLL
      for (int step = 0; step < kBlockInputs / kStepInputs; ++step) {
        PERMLLM_UNROLL
        for (int part = 0; part < Parts; ++part) {
          const int down = (Parts - 1 - part) * kPartBits;
          const __m128i first = _mm_srli_epi16(eight(2 * step), down);
          const __m128i second = _mm_srli_epi16(eight(2 * step + 1), down);
          const __m128i both =
              _mm_packus_epi16(_mm_and_si128(first, mask), _mm_and_si128(second, mask));
          char* target = bytes + (step * Parts + part) * kStepInputs;
          _mm_store_si128(reinterpret_cast<__m128i*>(target), both);
        }
      }
    }

    // As large as it may be: sums that parts have together, of products with -128, must fit.
    static int largest(int64_t k) {
      constexpr auto kLargest = static_cast<int64_t>(kRange - 1);
      if (!Isa::kOneSum) return static_cast<int>(kLargest);
      return static_cast<int>(smaller(kLargest, INT32_MAX / 128 / ceil_div(k, 2)));
    }
  };

  // A sum that parts share is off by the whole shift. Where they have sums of their own only the
  // upper one is, by half of its range.
  struct Outputs : IntegerOutputs<Real, Lanes::kSums> {
    Outputs(const LinearOf<Real>& a, const Inputs& inputs, int64_t group)
        : IntegerOutputs<Real, Lanes::kSums>(
              a, inputs, Isa::kOneSum || !kShifted ? kShift : 1u << (kPartBits - 1), group) {}
  };
};

// y = x @ W^T + bias for any number of tokens; up to kLaneSplitTokens in two parts, beyond in one.
template <class Isa, class Value, int Of, class Real>
void int8_lanes(const LinearOf<Real>& a, Worker& worker) {
  static_assert(Isa::Tuning::kPackedTokens == Float32Tuning::kPackedTokens, "packed_x is as large");
  a.m <= Isa::Tuning::kLaneSplitTokens
      ? go_through_parts<LaneTokens<IntegerProducts<Isa, Value, Of, 2, Real>>>(a, worker)
      : go_through_parts<LaneTokens<IntegerProducts<Isa, Value, Of, 1, Real>>>(a, worker);
}

}  // namespace
}  // namespace permllm::cpu
