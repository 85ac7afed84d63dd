// bfloat16 and float16 from and to float, in plain code that shares nothing with the kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cpu/packing/layout.h"

namespace {

using permllm::cpu::bf16;
using permllm::cpu::fp16;

inline bf16 rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float widened(bf16 value) {
  const uint32_t bits = uint32_t{value} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline float widened(fp16 value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  const float magnitude =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return (value.bits & 0x8000) != 0 ? -magnitude : magnitude;
}

inline void set(bf16& entry, float value) { entry = rounded(value); }

// Towards zero.
inline void set(fp16& entry, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  const uint32_t subnormal = static_cast<uint32_t>(std::abs(std::ldexp(value, 24)));
  entry.bits = static_cast<uint16_t>(
      sign | (magnitude < 0x38800000 ? subnormal : (magnitude - 0x38000000) >> 13));
}

}  // namespace
