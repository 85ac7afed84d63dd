// Four bits each (layout.h): how they share bytes, which int8 values fit, and as multiples of what.
#pragma once

#include <cstdint>
#include <numeric>

#include "cpu/packing/layout.h"

namespace permllm::cpu {

constexpr int kSmallestQuotient = -8, kLargestQuotient = 7;

// What the values of a row of a block are multiples of: their greatest common divisor, 1 where all
// are zero. 0 where that leaves quotients that have no 4 bits.
static inline uint8_t multiplier_of(const int8_t* values, int64_t count) {
  int divisor = 0, smallest = 0, largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int value = values[i];
    if (divisor == 0 || value % divisor != 0) divisor = std::gcd(divisor, value);
    smallest = value < smallest ? value : smallest;
    largest = value > largest ? value : largest;
  }
  if (divisor == 0) return 1;
  const bool fit = smallest >= kSmallestQuotient * divisor && largest <= kLargestQuotient * divisor;
  return fit ? static_cast<uint8_t>(divisor) : 0;
}

// To a place of one of 2 * Halves rows, two of which share bytes.
template <int Count, int Halves>
void write_four_bits(uint8_t (&bytes)[Halves][Count], int one, int place, int bits) {
  bytes[one % Halves][place] |= static_cast<uint8_t>(one < Halves ? bits : bits << 4);
}

// Whether all of a layer's values fit, [n, k / 2].
bool fit_four_bits(const int8_t* values, int64_t n, int64_t k);

}  // namespace permllm::cpu
