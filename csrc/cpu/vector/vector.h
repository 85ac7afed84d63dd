// What the kernels with vectors of any width share. They are templates that the compiler makes code
// of for one instruction set after the other. Sparse blocks are in the permuted order.
//
// Include after every other header: what follows is compiled for one instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/tuning.h"

namespace permllm::cpu {
namespace {

#define PERMLLM_UNROLL _Pragma("GCC unroll 16")

constexpr int kRows = kPortableRows;  // of every layout that these kernels read

inline float to_float(bf16 value) {
  const uint32_t bits = uint32_t{value} << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

inline float to_float(int8_t value) { return value; }

// Of a row's mask, how many of every eight inputs are kept, a byte each.
inline uint64_t kept_of_eights(uint64_t mask) {
  uint64_t counts = mask - (mask >> 1 & 0x5555555555555555);
  counts = (counts & 0x3333333333333333) + (counts >> 2 & 0x3333333333333333);
  return (counts + (counts >> 4)) & 0x0f0f0f0f0f0f0f0f;
}

// Four of each, as 2:4 and 4:8 keep: it takes less to find these.
constexpr uint64_t kFourOfEights = 0x0404040404040404;

// Exponent and fraction move to their places in a float32, which is 2^112 too small then.
inline float to_float(fp16 value) {
  uint32_t bits = (value.bits & 0x7fffu) << 13;
  const bool finite = bits < 0x7c00u << 13;
  if (!finite) bits |= 0x7f800000;
  float magnitude;
  __builtin_memcpy(&magnitude, &bits, sizeof(magnitude));
  if (finite) magnitude *= 0x1p112f;
  return (value.bits & 0x8000) != 0 ? -magnitude : magnitude;
}

inline float to_float(float value) { return value; }

inline void round_to(float& target, float value) { target = value; }

inline void round_to(fp16& target, float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t rounded;
  if (magnitude > 0x7f800000) {
    rounded = 0x7e00;  // a quiet NaN
  } else if (magnitude >= 0x477ff000) {
    rounded = 0x7c00;  // from 65520 on infinity is nearest
  } else if (magnitude >= 0x38800000) {
    rounded = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  } else {  // below 2^-14: in units of 2^-24, which the addition rounds to
    float units;
    __builtin_memcpy(&units, &magnitude, sizeof(units));
    units = units * 0x1p24f + 0x1p23f;
    __builtin_memcpy(&rounded, &units, sizeof(rounded));
    rounded &= 0x7fffff;
  }
  target.bits = static_cast<uint16_t>(sign | rounded);
}

inline void round_to(bf16& target, float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  // Else a NaN, made quiet. Compared with a sign, as SSE2 and AVX2 can.
  const bool number = static_cast<int32_t>(bits & 0x7fffffff) <= 0x7f800000;
  target = static_cast<bf16>(number ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40);
}

// No load moves across it. Else GCC 12 loads x once for several rows, to registers that sums need.
inline void keep_loads_apart() { __asm__ volatile("" ::: "memory"); }

template <class Vector, class Lane>
inline Vector load(const Lane* aligned) {
  return *reinterpret_cast<const Vector*>(aligned);
}

template <class Vector, class Lane>
inline void store(Lane* aligned, Vector vector) {
  *reinterpret_cast<Vector*>(aligned) = vector;
}

// Sums of some rows, `stride` lanes apart, and of some vectors of tokens.
template <int Rows, int Vectors, class Vector, class Lane>
inline void load_sums(const Lane* sums, int64_t stride, Vector (&registers)[Rows][Vectors]) {
  constexpr int kLanes = sizeof(Vector) / sizeof(Lane);
  PERMLLM_UNROLL
  for (int r = 0; r < Rows; ++r) {
    PERMLLM_UNROLL
    for (int v = 0; v < Vectors; ++v)
      registers[r][v] = load<Vector>(sums + r * stride + v * kLanes);
  }
}

template <int Rows, int Vectors, class Vector, class Lane>
inline void store_sums(Lane* sums, int64_t stride, const Vector (&registers)[Rows][Vectors]) {
  constexpr int kLanes = sizeof(Vector) / sizeof(Lane);
  PERMLLM_UNROLL
  for (int r = 0; r < Rows; ++r) {
    PERMLLM_UNROLL
    for (int v = 0; v < Vectors; ++v) store(sums + r * stride + v * kLanes, registers[r][v]);
  }
}

}  // namespace
}  // namespace permllm::cpu
