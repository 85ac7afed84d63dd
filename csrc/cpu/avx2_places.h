// Where AVX2 finds the values of eight inputs: a table with an entry for every mask of eight.
#pragma once

#include <cstdint>

namespace permllm::cpu {
namespace {

// For vpshufb, where each byte of eight lanes comes from: of four values, or none where the input
// is pruned. A value goes to the top of its lane.
template <class Value, int LaneBytes>
struct Places {
  static constexpr uint8_t kZero = 0x80;

  constexpr Places() {
    for (int mask = 0; mask < 256; ++mask) {
      int value = 0;
      for (int lane = 0; lane < 8; ++lane) {
        const bool kept = (mask >> lane & 1) != 0;
        for (int byte = 0; byte < LaneBytes; ++byte) {
          const int of_value = byte - (LaneBytes - static_cast<int>(sizeof(Value)));
          of[mask][lane * LaneBytes + byte] =
              kept && of_value >= 0 ? static_cast<uint8_t>(value * sizeof(Value) + of_value)
                                    : kZero;
        }
        value += kept;
      }
    }
  }

  alignas(8 * LaneBytes) uint8_t of[256][8 * LaneBytes] = {};
};

template <class Value, int LaneBytes>
constexpr Places<Value, LaneBytes> kPlaces;

// Of int8 values, in lanes of a byte.
inline int64_t places(uint8_t mask) {
  int64_t entry;
  __builtin_memcpy(&entry, kPlaces<int8_t, 1>.of[mask], sizeof(entry));
  return entry;
}

}  // namespace
}  // namespace permllm::cpu
