// int8 values in lanes (layout.h): integer products, summed in lanes of 32 bits.
//
// x is rounded to integers, shifted to be unsigned, and cut into parts of 7 or 8 bits, each of
// which meets the values that its inputs are brought to.
//
// Templates over an instruction set, a struct with
//   Vector               32-bit integers, a type of the compiler's
//   Tuning               its constants (tuning.h)
//   kPartBits            of an integer
//   kTogether            whether the parts of a token have one sum
//   multiply(sums, x, places, values) adds products to the sums of a token, of x of 8 inputs in
//                        each part
//
// Include after every other header: what follows is compiled for one instruction set.
#pragma once

#include "int8.h"
#include "lanes.h"
// The vector code comes last.
#include "avx2_lanes.h"

namespace permllm::cpu {
namespace {

template <class Isa, int Of, int Parts>
struct IntegerLanes {
  using Block = LaneBlock<int8_t, Of>;
  using Vector = typename Isa::Vector;
  using Lane = uint32_t;  // which wraps: `packed` may hold anything
  static constexpr int kParts = Isa::kTogether ? 1 : Parts;
  template <int Tokens>
  static constexpr int kChains = Tokens == 1 ? 2 : 1;
  static constexpr int kSteps = kEights, kStepBytes = 8 * Parts;

  template <int Tokens, int Chains>
  static inline void multiply(const Block& block, const char* x,
                              Vector (&sums)[Tokens][Chains][kParts]) {
    PERMLLM_UNROLL
    for (int eight = 0; eight < kEights; ++eight) {
      const __m256i places = LanePlacesOf<Of>(block, eight).bytes();
      const __m256i values = load_bits(block.values[eight]);
      PERMLLM_UNROLL
      for (int t = 0; t < Tokens; ++t) {
        const char* inputs = x + (eight * Tokens + t) * kStepBytes;
        Isa::template multiply<Parts>(sums[t][eight % Chains], inputs, places, values);
      }
    }
  }
};

// As lanes.h asks for them.
template <class Isa, int Of, int Parts, class RealType>
struct IntegerProducts {
  using Tuning = typename Isa::Tuning;
  using Real = RealType;
  using Lanes = IntegerLanes<Isa, Of, Parts>;
  static constexpr int kBits = Parts * Isa::kPartBits;
  static constexpr uint32_t kShift = 1u << (kBits - 1);

  struct Inputs : IntegerInputs<Real> {
    explicit Inputs(const LinearOf<Real>& a) : IntegerInputs<Real>(a, largest(a.k), a.m) {}

    // [eight inputs][part][input], the upper part first.
    void load(int64_t token, int64_t block, char* bytes) const {
      uint16_t shifted[kBlockInputs];
      this->round(token, block, kShift, shifted);
      for (int part = 0; part < Parts; ++part) {
        const int down = Isa::kPartBits * (Parts - 1 - part);
        for (int eight = 0; eight < kEights; ++eight) {
          for (int i = 0; i < 8; ++i) {
            bytes[(eight * Parts + part) * 8 + i] =
                static_cast<char>(shifted[8 * eight + i] >> down & ((1 << Isa::kPartBits) - 1));
          }
        }
      }
    }

    // As large as it may be: sums that parts have together, of products with -128, must fit.
    static int largest(int64_t k) {
      constexpr auto kLargest = static_cast<int64_t>(kShift - 1);
      if (!Isa::kTogether) return static_cast<int>(kLargest);
      return static_cast<int>(smaller(kLargest, INT32_MAX / 128 / ceil_div(k, 2)));
    }
  };

  // The upper part is shifted by half of its range, the sum of parts by as much in its units.
  struct Outputs : IntegerOutputs<Real, Lanes::kParts> {
    Outputs(const LinearOf<Real>& a, const Inputs& inputs, int64_t group)
        : IntegerOutputs<Real, Lanes::kParts>(
              a, inputs, Isa::kTogether ? kShift : 1u << (Isa::kPartBits - 1), group) {}
  };
};

// y = x @ W^T + bias for any number of tokens; up to kSplitTokens in two parts, beyond in Parts.
template <class Isa, int Of, int Parts, class Real>
void int8_lanes(const LinearOf<Real>& a, Worker& worker) {
  if (Parts < 2 && a.m <= Isa::Tuning::kSplitTokens) {
    return go_through_parts<LaneTokens<IntegerProducts<Isa, Of, 2, Real>>>(a, worker);
  }
  go_through_parts<LaneTokens<IntegerProducts<Isa, Of, Parts, Real>>>(a, worker);
}

}  // namespace
}  // namespace permllm::cpu
