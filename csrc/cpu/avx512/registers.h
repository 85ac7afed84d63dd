// What the compiler would choose worse: registers of AVX-512 and what goes into them. Built for
// instructions in software (PERMLLM_EMULATED), it has none to choose.
//
// Include after every other header, in files that are compiled for AVX-512 only.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace permllm::cpu {
namespace {

// Merged with this, an expansion waits for no old content of its register, as the zeroing form
// does on Zen 4.
inline __m512i fresh_zero() {
  __m512i zero = _mm512_setzero_si512();
#if !defined(PERMLLM_EMULATED)
  __asm__("" : "+v"(zero));  // keeps the compiler from choosing the zeroing form
#endif
  return zero;
}

using HalfMask = uint32_t __attribute__((may_alias));

// Straight from memory to a mask register, by no general one.
inline __mmask32 load_mask(const HalfMask& memory) {
#if defined(PERMLLM_EMULATED)
  return memory;
#else
  __mmask32 mask;
  __asm__("kmovd %1, %0" : "=k"(mask) : "m"(memory));
  return mask;
#endif
}

inline __mmask64 load_mask(const uint64_t& memory) {
#if defined(PERMLLM_EMULATED)
  return memory;
#else
  __mmask64 mask;
  __asm__("kmovq %1, %0" : "=k"(mask) : "m"(memory));
  return mask;
#endif
}

}  // namespace
}  // namespace permllm::cpu
