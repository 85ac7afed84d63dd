// What the AVX-512 kernels share: vector pieces.
// Include after every other header, in files that are compiled for AVX-512 only.
#pragma once

#include <immintrin.h>

#include "cpu/packing/layout.h"
#include "cpu/tuning.h"

namespace permllm::cpu {
namespace {

constexpr int kRows = kAvx512Rows;
constexpr int kLanes = 16;  // 32-bit lanes: pairs of inputs, or tokens

#define PERMLLM_UNROLL _Pragma("GCC unroll 32")

// Of a loop that fills the registers with sums: where GCC 12 knows anything about its callers, it
// keeps copies of the sums, of which some go to memory.
#if defined(__clang__)
#define PERMLLM_APART __attribute__((noinline))
#else
#define PERMLLM_APART __attribute__((noipa))
#endif

template <int Hint, int Bytes>
inline void prefetch(const char* memory) {
  PERMLLM_UNROLL
  for (int offset = 0; offset < Bytes; offset += 64) __builtin_prefetch(memory + offset, 0, Hint);
}

inline __m512i join(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

#if defined(__AVX512BF16__) || defined(PERMLLM_TARGET_BF16)
inline __m512 dot_pairs(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#endif

}  // namespace
}  // namespace permllm::cpu
