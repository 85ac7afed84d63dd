// int8 values, of sparse and of dense rows, in vectors of any width: integer products, summed in
// lanes of 32 bits.
//
// With vpdpbusd, four unsigned bytes of x meet four signed ones: x is rounded to integers of 8 bits
// (W8A8), or of 16 bits whose two bytes are parts of their own (W8A16), and shifted to be unsigned
// (token_scale.h). With vpmaddwd, two integers of 16 bits meet two values of dense rows that are
// widened to as many; they are as large as sums have room for.
//
// Templates over an instruction set, a struct with
//   Vector       32-bit integers, a type of the compiler's
//   kLanes       of them
//   Element      of x: uint8_t, shifted, or int16_t
//   Tuning       its constants (tuning.h)
//   decode       the inputs of a vector of a row, zeros where pruned
//   widen        so many values that nothing is pruned of
//   broadcast    a lane to all
//   multiply     (sums, x, weights)
//
// Include after every other header: what follows is compiled for one instruction set.
#pragma once

#include <type_traits>

#include "cpu/token_scale.h"
// The vector code comes last.
#include "cpu/vector/output_rows.h"
#include "cpu/vector/row_groups.h"

namespace permllm::cpu {
namespace {

// The bits of magnitudes have their order.
template <class Real>
inline float largest_magnitude(const Real* x, int64_t count) {
  uint16_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint16_t bits;
    __builtin_memcpy(&bits, x + i, sizeof(bits));
    bits &= 0x7fff;
    largest = bits > largest ? bits : largest;
  }
  Real magnitude;
  __builtin_memcpy(&magnitude, &largest, sizeof(magnitude));
  return to_float(magnitude);
}

// x as integers.
template <class Real>
struct IntegerInputs {
  // The largest magnitude of a token becomes `largest`. So many tokens are measured, those past the
  // last as zero.
  IntegerInputs(const LinearOf<Real>& arguments, int largest, int64_t measured)
      : a(arguments),
        largest_integer(largest),
        tokens(measured),
        scales(a.token_scales),
        inverses(scales + measured) {}

  int64_t measures() const { return tokens; }

  void measure(int64_t t) const {
    if (t >= a.m) {
      scales[t] = 0.0f;
      return;
    }
    const TokenScale token(largest_magnitude(a.x + t * a.x_stride, a.k), largest_integer);
    scales[t] = token.scale;
    inverses[t] = token.inverse;
  }

  // A token's inputs of a block, shifted by `shift`; past k the shift itself.
  void round(int64_t token, int64_t block, uint32_t shift,
             uint16_t (&shifted)[kBlockInputs]) const {
    // Added to a number below 2^22 in magnitude, it leaves that, rounded to nearest even, in the
    // lower bits.
    constexpr float kRound = 0x1.8p23f;
    constexpr uint32_t kRoundBits = 0x4b400000;
    const int64_t first = block * kBlockInputs;
    const int64_t inputs = smaller(kBlockInputs, a.k - first);
    const Real* source = a.x + token * a.x_stride + first;
    const float inverse = inverses[token];
    for (int64_t i = 0; i < inputs; ++i) {
      const float rounded = to_float(source[i]) * inverse + kRound;
      uint32_t bits;
      __builtin_memcpy(&bits, &rounded, sizeof(bits));
      shifted[i] = static_cast<uint16_t>(bits - kRoundBits + shift);
    }
    for (int64_t i = inputs; i < kBlockInputs; ++i) shifted[i] = static_cast<uint16_t>(shift);
  }

  const LinearOf<Real>& a;
  const int largest_integer;
  const int64_t tokens;
  float* const scales;
  float* const inverses;
};

// What turns the sums of one row group into outputs: one of each token and row, or two whose first
// is in units of 256. The first one is shifted.
template <class Real, int Sums>
struct IntegerOutputs : OutputRows<Real> {
  IntegerOutputs(const LinearOf<Real>& a, const IntegerInputs<Real>& inputs, uint32_t shift,
                 int64_t group)
      : OutputRows<Real>(a, group), scales(inputs.scales) {
    for (int r = 0; r < this->rows; ++r) {
      of_shift[r] = static_cast<uint32_t>(a.behind.value_sums[this->row + r]) * shift;
      factor[r] = a.scale[this->row + r];
    }
  }

  float value(int64_t token, int r, const uint32_t* totals) const {
    auto sum = static_cast<float>(static_cast<int32_t>(totals[0] - of_shift[r]));
    if constexpr (Sums == 2) {
      sum = sum * 256.0f + static_cast<float>(static_cast<int32_t>(totals[1]));
    }
    return sum * factor[r] * scales[token] + this->bias[r];
  }

  const float* scales;
  uint32_t of_shift[kRows] = {};
  float factor[kRows] = {};
};

// As vector/few.h and, with one part, vector/many.h ask for them.
template <class Isa, class ValueType, int Parts, class RealType>
struct Int8Products {
  using Element = typename Isa::Element;
  static constexpr bool kShifted = sizeof(Element) == 1;
  static_assert(sizeof(RealType) == 2 && (Parts == 1 || (Parts == 2 && kShifted)));
  using Tuning = typename Isa::Tuning;
  using Real = RealType;
  using Weights = PackedBlocks<ValueType>;  // of int8_t or dense8
  using Vector = typename Isa::Vector;
  using Lane = uint32_t;  // which wraps: `packed` may hold anything
  static constexpr int kLanes = Isa::kLanes, kLaneInputs = 4 / sizeof(Element);
  static constexpr int kInputs = kLaneInputs * kLanes, kParts = Parts;
  static constexpr bool kOperandsOfX = !kShifted;

  static inline Vector decode(Weights place, int row, int first) {
    if constexpr (std::is_same_v<ValueType, dense8>) {
      return Isa::widen((*place).values[row] + first);
    } else {
      const auto* mask = reinterpret_cast<const uint8_t*>(&(*place).mask[row]) + first / 8;
      return Isa::decode(mask, (*place).values[row] + first / 2);
    }
  }

  static inline void decode_row(Weights place, int row, uint32_t* dense) {
    PERMLLM_UNROLL
    for (int first = 0; first < kBlockInputs; first += kInputs) {
      store(dense + first / kLaneInputs, decode(place, row, first));
    }
  }

  static inline Vector multiply(Vector sum, Vector weights, Vector x) {
    return Isa::multiply(sum, x, weights);
  }

  static inline Vector multiply(Vector sum, uint32_t weights, Vector x) {
    return Isa::multiply(sum, x, Isa::broadcast(weights));
  }

  struct Inputs : IntegerInputs<Real> {
    // Those that fill the last vector are measured too.
    explicit Inputs(const LinearOf<Real>& a)
        : IntegerInputs<Real>(a, largest(a.k), ceil_div(a.m, kLanes) * kLanes) {}

    // With two parts, the upper bytes first. Past k stands what no value meets.
    void load(int64_t token, int64_t block,
              uint32_t (&parts)[Parts][kBlockInputs / kLaneInputs]) const {
      constexpr uint32_t kShift = !kShifted ? 0 : Parts == 2 ? kShift16 : kShift8;
      uint16_t shifted[kBlockInputs];
      this->round(token, block, kShift, shifted);
      Element elements[Parts][kBlockInputs];
      for (int i = 0; i < kBlockInputs; ++i) {
        elements[Parts - 1][i] = static_cast<Element>(shifted[i]);
        if constexpr (Parts == 2) elements[0][i] = static_cast<Element>(shifted[i] >> 8);
      }
      __builtin_memcpy(parts, elements, sizeof(elements));
    }

    // As large as it may be, where it is not of 8 bits: sums of products with -128 must fit.
    static int largest(int64_t k) {
      static_assert(kShifted || std::is_same_v<ValueType, dense8>, "all inputs are summed");
      if (kShifted) return Parts == 2 ? kLargest16 : kLargest8;
      return static_cast<int>(smaller(kLargest16, INT32_MAX / 128 / k));
    }
  };

  // The shift is 128 of the upper byte.
  struct Outputs : IntegerOutputs<Real, Parts> {
    Outputs(const LinearOf<Real>& a, const Inputs& inputs, int64_t group)
        : IntegerOutputs<Real, Parts>(a, inputs, kShifted ? kShift8 : 0, group) {}
  };
};

}  // namespace
}  // namespace permllm::cpu
