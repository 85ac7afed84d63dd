// The types that activations have, and how 8-bit weights become such.
#pragma once

#include "device.h"

namespace permllm::cuda {

struct BFloat16 {
  static PERMLLM_DEVICE uint16_t from_float(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
  static PERMLLM_DEVICE float to_float(uint16_t bits) {
    return __bfloat162float(__ushort_as_bfloat16(bits));
  }
  template <int kSelector>
  static PERMLLM_DEVICE void multiply(float (&sum)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[4], uint32_t metadata) {
    multiply_bfloat16<kSelector>(sum, a, b, metadata);
  }
  // Two int8, in the low bytes of the halves of `bytes`. With b the byte as unsigned,
  // 128 + (b & 127) has the bits 0x4300 | (b & 127), and 128 + (b & 128) the bits
  // 0x4300 | (b & 128). Their difference is the value, exactly.
  static PERMLLM_DEVICE uint32_t from_int8(uint32_t bytes) {
    const uint32_t magnitude = and_xor(bytes, 0x007f007fu, 0x43004300u);
    const uint32_t offset = and_xor(bytes, 0x00800080u, 0xc300c300u);
    return multiply_add_bfloat16x2(magnitude, 0x3f803f80u, offset);
  }
};

struct Float16 {
  static PERMLLM_DEVICE uint16_t from_float(float value) {
    return __half_as_ushort(__float2half_rn(value));
  }
  static PERMLLM_DEVICE float to_float(uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
  }
  template <int kSelector>
  static PERMLLM_DEVICE void multiply(float (&sum)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[4], uint32_t metadata) {
    multiply_float16<kSelector>(sum, a, b, metadata);
  }
  // 0x6400 | c is 1024 + c for 0 <= c < 1024; here c is the value plus 128, and 0xe480 is -1152.
  static PERMLLM_DEVICE uint32_t from_int8(uint32_t bytes) {
    return add_float16x2(((bytes ^ 0x00800080u) & 0x00ff00ffu) | 0x64006400u, 0xe480e480u);
  }
};

}  // namespace permllm::cuda
