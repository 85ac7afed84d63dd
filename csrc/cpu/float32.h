// What the float32 kernels share. They serve instruction sets that have no bfloat16 products:
// values and x are widened to float32, exactly, so that int8 values meet x as it is.
//
// The kernels are templates over an instruction set, a struct with
//   Vector    kLanes floats, a type of GCC's vector extension
//   kSums     vectors that the registers hold beside the operands of their products
//   decode    kLanes inputs of a row, zeros where pruned, in units of kUnit<Value>
// A row keeps four of every eight inputs, so the place of its values follows from that of its mask.
//
// Include after every other header: what follows is compiled for one instruction set.
#pragma once

#include "kernels.h"

namespace permllm::cpu {
namespace {

#define PERMLLM_UNROLL _Pragma("GCC unroll 16")

constexpr int kRows = kPortableRows;  // of every layout that these kernels read

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline float to_float(bf16 value) {
  const uint32_t bits = uint32_t{value} << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

inline float to_float(int8_t value) { return value; }

inline bf16 to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<bf16>(bits >> 16 | 0x40);  // a quiet NaN
  return static_cast<bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class Vector>
inline Vector load(const float* aligned) {
  return *reinterpret_cast<const Vector*>(aligned);
}

template <class Vector>
inline void store(float* aligned, Vector vector) {
  *reinterpret_cast<Vector*>(aligned) = vector;
}

// Inputs first..first+Isa::kLanes-1 of one row of a block.
template <class Isa, class Value>
inline typename Isa::Vector decode(const Block<kRows, Value>& block, int row, int first) {
  const auto* mask = reinterpret_cast<const uint8_t*>(&block.mask[row]) + first / 8;
  return Isa::decode(mask, block.values[row] + first / 2);
}

// All 64 inputs of one row of a block.
template <class Isa, class Value>
inline void decode_row(const Block<kRows, Value>& block, int row, float* dense) {
  if constexpr (requires { Isa::decode_row(block, row, dense); }) {
    Isa::decode_row(block, row, dense);
  } else {
    PERMLLM_UNROLL
    for (int first = 0; first < kBlockInputs; first += Isa::kLanes) {
      store(dense + first, decode<Isa>(block, row, first));
    }
  }
}

// What turns the sums of one row group into outputs.
struct Outputs {
  Outputs(const LinearArguments& a, int64_t group, float unit)
      : row(group * kRows), rows(static_cast<int>(smaller(kRows, a.n - row))) {
    for (int r = 0; r < rows; ++r) {
      factor[r] = a.scale != nullptr ? a.scale[row + r] * unit : unit;
      bias[r] = a.bias != nullptr ? to_float(a.bias[row + r]) : 0.0f;
    }
  }

  bf16 value(int r, float sum) const { return to_bf16(sum * factor[r] + bias[r]); }

  int64_t row;
  int rows;
  float factor[kRows];
  float bias[kRows];
};

}  // namespace
}  // namespace permllm::cpu
