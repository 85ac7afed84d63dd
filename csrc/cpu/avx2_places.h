// Where AVX2 finds the int8 values of eight inputs: a table with an entry for every mask of eight.
#pragma once

#include <cstdint>

namespace permllm::cpu {
namespace {

// A byte of an entry says which of four values its input has, for vpshufb; pruned ones have none.
struct Places {
  static constexpr uint64_t kZero = 0x80;

  constexpr Places() {
    for (int mask = 0; mask < 256; ++mask) {
      uint64_t value = 0;
      for (int input = 0; input < 8; ++input) {
        const bool kept = (mask >> input & 1) != 0;
        of[mask] |= (kept ? value : kZero) << (8 * input);
        value += kept;
      }
    }
  }

  uint64_t of[256] = {};
};

constexpr Places kPlaces;

inline int64_t places(uint8_t mask) { return static_cast<int64_t>(kPlaces.of[mask]); }

}  // namespace
}  // namespace permllm::cpu
