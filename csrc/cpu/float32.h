// Float32 products. They serve instruction sets that have no bfloat16 products, and activations of
// float32: values and x are widened to float32, exactly, so that int8 values meet x as it is.
//
// Templates over an instruction set, a struct with
//   Vector    kLanes floats, a type of GCC's vector extension
//   Tuning    its constants (tuning.h)
//   decode    kLanes inputs of a row, zeros where pruned, in units of kUnit<Value>; or decode_row
//
// Include after every other header: what follows is compiled for one instruction set.
#pragma once

#include "vector.h"

namespace permllm::cpu {
namespace {

// What turns the sums of one row group into outputs.
template <class Real>
struct Float32Outputs : OutputRows<Real> {
  Float32Outputs(const LinearOf<Real>& a, int64_t group, float unit) : OutputRows<Real>(a, group) {
    for (int r = 0; r < this->rows; ++r) {
      factor[r] = a.scale != nullptr ? a.scale[this->row + r] * unit : unit;
    }
  }

  void write(int64_t token, int r, float sum) const {
    round_to(this->y[token * this->stride + r], sum * factor[r] + this->bias[r]);
  }

  float factor[kRows];
};

// As vector_few.h and vector_many.h ask for them.
template <class Isa, class ValueType, class RealType>
struct Float32Products {
  using Tuning = typename Isa::Tuning;
  using Real = RealType;
  using Value = ValueType;
  using Vector = typename Isa::Vector;
  using Lane = float;
  static constexpr int kLanes = Isa::kLanes, kInputs = kLanes, kParts = 1;
  static constexpr bool kOperandsOfX = true;

  static inline Vector decode(const Block<kRows, Value>& block, int row, int first) {
    const auto* mask = reinterpret_cast<const uint8_t*>(&block.mask[row]) + first / 8;
    return Isa::decode(mask, block.values[row] + first / 2);
  }

  static inline void decode_row(const Block<kRows, Value>& block, int row, float* dense) {
    if constexpr (requires { Isa::decode_row(block, row, dense); }) {
      Isa::decode_row(block, row, dense);
    } else {
      PERMLLM_UNROLL
      for (int first = 0; first < kBlockInputs; first += kLanes) {
        store(dense + first, decode(block, row, first));
      }
    }
  }

  static inline Vector multiply(Vector sum, Vector weights, Vector x) { return sum + weights * x; }
  static inline Vector multiply(Vector sum, float weight, Vector x) { return sum + weight * x; }

  struct Inputs {
    explicit Inputs(const LinearOf<Real>& arguments) : a(arguments) {}

    static int64_t measures() { return 0; }
    static void measure(int64_t) {}

    void load(int64_t token, int64_t block, float (&parts)[1][kBlockInputs]) const {
      const int64_t first = block * kBlockInputs;
      const int64_t inputs = smaller(kBlockInputs, a.k - first);
      const Real* source = a.x + token * a.x_stride + first;
      for (int64_t i = 0; i < inputs; ++i) parts[0][i] = to_float(source[i]);
      for (int64_t i = inputs; i < kBlockInputs; ++i) parts[0][i] = 0.0f;
    }

    const LinearOf<Real>& a;
  };

  struct Outputs : Float32Outputs<Real> {
    Outputs(const LinearOf<Real>& a, const Inputs&, int64_t group)
        : Float32Outputs<Real>(a, group, Isa::template kUnit<Value>) {}

    void write(int64_t token, int r, const float* total) const {
      Float32Outputs<Real>::write(token, r, *total);
    }
  };
};

}  // namespace
}  // namespace permllm::cpu
