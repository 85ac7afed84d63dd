// bfloat16 values in 12 bits each (layout.h): which of them fit, and as what.
#pragma once

#include <cstdint>

#include "cpu/packing/layout.h"
#include "cpu/packing/pack.h"

namespace permllm::cpu {

constexpr bf16 kSign = 0x8000;
constexpr int kUpperBytes = 7;  // that a row tells apart, beside that of zero

// The place in the mask of a block that is not in groups, of one of its 64 inputs, and the input of
// a place. The inputs of the block's halves take turns, by one in a block of so many rows or by
// eight.
template <int Rows>
constexpr int kInTurn = Rows == kAmxRows ? 1 : 8;

template <int Rows>
constexpr int interleaved(int input) {
  constexpr int kTurn = kInTurn<Rows>;
  return input % 32 / kTurn * 2 * kTurn + input / 32 * kTurn + input % kTurn;
}

template <int Rows>
constexpr int uninterleaved(int place) {
  constexpr int kTurn = kInTurn<Rows>;
  return place / (2 * kTurn) * kTurn + place / kTurn % 2 * 32 + place % kTurn;
}

static_assert(interleaved<8>(9) == 17 && interleaved<8>(41) == 25 && uninterleaved<8>(25) == 41);
static_assert(interleaved<16>(9) == 18 && interleaved<16>(41) == 19 && uninterleaved<16>(19) == 41);

// The values of a row, as far as they decide about its 12 bits.
struct UpperByte {
  uint8_t largest = 0;  // without signs
  int64_t strays = 0;   // values that are not zero and too small beside it
};

// The smallest magnitude that a row has 12 bits for.
constexpr bf16 smallest_magnitude(uint8_t largest) {
  return static_cast<bf16>(largest < kUpperBytes ? 0 : (largest - kUpperBytes + 1) << 8);
}

constexpr bool is_stray(bf16 value, uint8_t largest) {
  const bf16 magnitude = value & ~kSign;
  return magnitude != 0 && magnitude < smallest_magnitude(largest);
}

inline UpperByte upper_byte(const bf16* values, int64_t count) {
  bf16 most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bf16 magnitude = values[i] & ~kSign;
    most = most < magnitude ? magnitude : most;
  }
  UpperByte row{static_cast<uint8_t>(most >> 8)};
  for (int64_t i = 0; i < count; ++i) row.strays += is_stray(values[i], row.largest) ? 1 : 0;
  return row;
}

// The four bits that stand for the upper byte of a value that is no stray.
constexpr uint8_t upper_code(bf16 value, uint8_t largest) {
  const bf16 magnitude = value & ~kSign;
  const int code = magnitude == 0 ? 0 : (magnitude >> 8) - largest + kUpperBytes;
  return static_cast<uint8_t>((value & kSign) >> 12 | code);
}

// The codes of two of four pairs of values share bytes: c in three bits each, and signs where one
// shift at most brings them to the highest bit.
inline void write_code(uint8_t (&upper)[2][64], int pair, int place, uint8_t code) {
  const int c = code & 7, sign = code >> 3;
  const int bits = pair < 2 ? c | sign << 7 : c << 3 | sign << 6;
  upper[pair % 2][place] |= static_cast<uint8_t>(bits);
}

static_assert(upper_code(0x3f80, 0x3f) == 7 && upper_code(0xbf80, 0x40) == 14 &&
              upper_code(kSign, 0x3f) == 8 && is_stray(0x387f, 0x3f) && !is_stray(0x3980, 0x3f));

// The packing of this layout for rows of `count` values, or the one in 16 bits where these have too
// many strays.
Packing find_strays(const PackedLayout& layout, const bf16* values, int64_t count);

// What the packing has found goes behind the blocks; returns where the list of strays begins.
Stray* write_tables(const Packing& packing, char* behind);

}  // namespace permllm::cpu
