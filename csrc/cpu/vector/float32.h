// Float32 products. They serve instruction sets that have no bfloat16 products, the output head of
// some among it, and activations of float32: values and x are widened to float32, exactly, so that
// int8 values meet x as it is.
//
// Templates over an instruction set, a struct with
//   Vector    kLanes floats, a type of GCC's vector extension
//   Tuning    its constants (tuning.h)
//   decode    kLanes inputs of a row, zeros where pruned, of their mask and their first value;
//             reads kLanes values
//
// Include after every other header: what follows is compiled for one instruction set.
#pragma once

#include "cpu/vector/output_rows.h"
#include "cpu/vector/row_groups.h"

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

  float value(int64_t, int r, const float* sum) const { return *sum * factor[r] + this->bias[r]; }

  float factor[kRows] = {};
};

// x as it is.
template <class Real>
struct Float32Inputs {
  explicit Float32Inputs(const LinearOf<Real>& arguments) : a(arguments) {}

  static int64_t measures() { return 0; }
  static void measure(int64_t) {}

  void load(int64_t token, int64_t block, float* values) const {
    const int64_t first = block * kBlockInputs;
    const int64_t inputs = smaller(kBlockInputs, a.k - first);
    const Real* source = a.x + token * a.x_stride + first;
    for (int64_t i = 0; i < inputs; ++i) values[i] = to_float(source[i]);
    for (int64_t i = inputs; i < kBlockInputs; ++i) values[i] = 0.0f;
  }

  const LinearOf<Real>& a;
};

// As vector/few.h asks for them.
template <class Isa, class ValueType, class RealType>
struct Float32Products {
  using Tuning = typename Isa::Tuning;
  using Real = RealType;
  using Weights = PackedBlocks<ValueType>;
  using Vector = typename Isa::Vector;
  using Lane = float;
  static constexpr int kLanes = Isa::kLanes, kInputs = kLanes, kParts = 1;
  static constexpr bool kOperandsOfX = true;

  static inline Vector decode(Weights place, int row, int first) {
    const uint64_t& mask = (*place).mask[row];
    const int before = __builtin_popcountll(mask & ((uint64_t{1} << first) - 1));
    return Isa::decode(reinterpret_cast<const uint8_t*>(&mask) + first / 8,
                       (*place).values[row] + before);
  }

  static inline Vector multiply(Vector sum, Vector weights, Vector x) { return sum + weights * x; }
  static inline Vector multiply(Vector sum, float weight, Vector x) { return sum + weight * x; }

  struct Inputs : Float32Inputs<Real> {
    using Float32Inputs<Real>::Float32Inputs;

    void load(int64_t token, int64_t block, float (&parts)[1][kBlockInputs]) const {
      Float32Inputs<Real>::load(token, block, parts[0]);
    }
  };

  struct Outputs : Float32Outputs<Real> {
    Outputs(const LinearOf<Real>& a, const Inputs&, int64_t group)
        : Float32Outputs<Real>(a, group, 1.0f) {}
  };
};

// The same of a matrix of bfloat16 or float16, the type of x, for vector/many.h too: Isa has
// widen() for kLanes of them.
template <class Isa, class RealType>
struct DenseProducts : Float32Products<Isa, bf16, RealType> {
  using Weights = MatrixRows<RealType>;
  using Vector = typename Isa::Vector;

  static inline Vector decode(Weights place, int row, int first) {
    return Isa::widen(place.row(row) + first);
  }

  static inline void decode_row(Weights place, int row, float* dense) {
    PERMLLM_UNROLL
    for (int first = 0; first < kBlockInputs; first += Isa::kLanes) {
      store(dense + first, decode(place, row, first));
    }
  }
};

}  // namespace
}  // namespace permllm::cpu
