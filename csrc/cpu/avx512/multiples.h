// The int8 values that four bits stand for: products q * m, q = -8..7, with a multiplier m
// (layout.h).
//
// Include after every other header, in files that are compiled for AVX-512 only.
#pragma once

#include <immintrin.h>

#include "cpu/packing/four_bits.h"

namespace permllm::cpu {
namespace {

constexpr int kQuotients = 1 << 4;

// Those of every m that a byte can hold: `packed` may hold anything.
struct Multiples {
  constexpr Multiples() {
    for (int m = 0; m < 256; ++m) {
      for (int i = 0; i < kQuotients; ++i) {
        of[m][i] = static_cast<uint8_t>((i + kSmallestQuotient) * m);
      }
    }
  }

  alignas(64) uint8_t of[256][kQuotients] = {};
};

constexpr Multiples kMultiples;

// The values of a row of a block that is not in groups, ascending by input.
template <int Rows>
inline __m256i multiples_of_row(const Block<Rows, int4>& block, int row) {
  constexpr int kHalf = Rows / 2;
  const auto* bytes = reinterpret_cast<const __m256i*>(block.values[row % kHalf]);
  const auto* table = reinterpret_cast<const __m128i*>(kMultiples.of[block.multipliers[row]]);
  __m256i index = _mm256_loadu_si256(bytes);
  if (row >= kHalf) index = _mm256_srli_epi16(index, 4);
  // Of an index, the lower four bits count: tables repeat.
  return _mm256_permutexvar_epi8(index, _mm256_broadcastsi128_si256(_mm_load_si128(table)));
}

}  // namespace
}  // namespace permllm::cpu
