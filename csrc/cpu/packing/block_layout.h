// How one row is written to a block of each layout (layout.h).
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/packing/four_bits.h"
#include "cpu/packing/layout.h"
#include "cpu/packing/twelve_bits.h"

namespace permllm::cpu {
namespace {

// The type that values have before they are packed.
template <class Value>
struct Source {
  using Type = Value;
};

template <>
struct Source<bf12> {
  using Type = bf16;
};

template <>
struct Source<int4> {
  using Type = int8_t;
};

template <class Value>
using SourceOf = typename Source<Value>::Type;

// What packing asks of the layouts of blocks.
template <class AnyBlock>
struct BlockTraits;

template <int Rows, class ValueType>
struct BlockTraits<Block<Rows, ValueType>> {
  using Value = ValueType;
  static constexpr int kRows = Rows;
  static constexpr int kTogether = Rows == kAmxRows ? kAmxGroups : 1;  // for one thread
  static constexpr bool kInterleaved = std::is_same_v<Value, bf12>;
};

template <class ValueType>
struct BlockTraits<GroupedBlock<ValueType>> {
  using Value = ValueType;
  static constexpr int kRows = kGroupedRows;
  static constexpr int kTogether = 1;
  static constexpr bool kInterleaved = false;
};

template <class ValueType, int Of>
struct BlockTraits<LaneBlock<ValueType, Of>> {
  using Value = ValueType;
  static constexpr int kRows = kPortableRows;
  static constexpr int kTogether = 1;
  static constexpr bool kInterleaved = false;
};

template <int Rows, class Value>
void write_mask(Block<Rows, Value>& block, int row, uint64_t mask) {
  block.mask[row] = mask;
}

template <class Value>
void write_mask(GroupedBlock<Value>& block, int row, uint64_t mask) {
  for (int group = 0; group < kGroups; ++group, mask >>= kGroupInputs) {
    block.mask[group / 2][mask_word(row, group % 2)] = static_cast<uint16_t>(mask);
  }
}

template <class Value, int Of>
void write_mask(LaneBlock<Value, Of>& block, int row, uint64_t mask) {
  constexpr int kFoursOfByte = LanePlaces<Of>::kFoursOfByte;
  for (int i = 0; i < kBlockValues; ++i, mask &= mask - 1) {
    const int four = i / kLaneValues, input = __builtin_ctzll(mask) % Of;
    const int place = Of == 4 ? input : input - i % (Of / 2);
    const int shift = 8 / kFoursOfByte * (four % kFoursOfByte);
    block.places[four / kFoursOfByte][row][i % kLaneValues] |= static_cast<uint8_t>(place << shift);
  }
}

// The i-th value of a row of a block in lanes.
template <class AnyBlock>
auto& value_of(AnyBlock& block, int row, int i) {
  auto& four = block.values[i / kLaneValues];
  if constexpr (std::is_same_v<typename BlockTraits<std::remove_const_t<AnyBlock>>::Value, bf16>) {
    return four[i % kLaneValues / 2][row][i % 2];
  } else {
    return four[row][i % kLaneValues];
  }
}

// The values of a row of a block, ascending by place.
template <int Rows, class Value>
void write_values(Block<Rows, Value>& block, int row, const Value* values) {
  std::memcpy(block.values[row], values, sizeof(block.values[row]));
}

// body(half, vector, place, value) for the int8 values of a row of a block in groups.
template <class Body>
void for_each_place(int row, const int8_t* values, Body body) {
  for (int group = 0; group < kGroups; ++group, values += kGroupValues) {
    for (int j = 0; j < 4; ++j) {
      for (int i = 0; i < 2; ++i) {
        body(group / 2, j, 2 * mask_word(row, group % 2) + i, values[value_of_vector(j, i)]);
      }
    }
  }
}

inline void write_values(GroupedBlock<int8_t>& block, int row, const int8_t* values) {
  for_each_place(row, values, [&](int half, int vector, int place, int8_t value) {
    block.values[half][vector][place] = value;
  });
}

template <class Value, int Of>
void write_values(LaneBlock<Value, Of>& block, int row, const Value* values) {
  for (int i = 0; i < kBlockValues; ++i) value_of(block, row, i) = values[i];
}

inline void write_value(GroupedBlock<bf12>& block, int row, int i, bf16 value, uint8_t largest) {
  const int group = i / kGroupValues, half = group / 2, pair = i % kGroupValues / 2;
  const int word = mask_word(row, group % 2);
  const int place = word / 8 * 16 + i % 2 * 8 + word % 8;
  block.lower[half][pair][place] = static_cast<uint8_t>(value);
  write_code(block.upper[half], pair, place, upper_code(value, largest));
}

template <int Rows>
void write_value(Block<Rows, bf12>& block, int row, int i, bf16 value, uint8_t largest) {
  block.lower[row][i] = static_cast<uint8_t>(value);
  write_four_bits(block.upper, row, i, upper_code(value, largest));
}

// The four bits of a value.
inline int quotient_bits(int8_t value, uint8_t multiplier) {
  return value / multiplier - kSmallestQuotient;
}

// The values in 4 bits of a row of a block, and their multiplier.
template <int Rows>
void write_values(Block<Rows, int4>& block, int row, const int8_t* values, uint8_t multiplier) {
  for (int i = 0; i < kBlockValues; ++i) {
    write_four_bits(block.values, row, i, quotient_bits(values[i], multiplier));
  }
  block.multipliers[row] = multiplier;
}

inline void write_values(GroupedBlock<int4>& block, int row, const int8_t* values,
                         uint8_t multiplier) {
  for_each_place(row, values, [&](int half, int vector, int place, int8_t value) {
    write_four_bits(block.values[half], vector, place, quotient_bits(value, multiplier));
  });
  block.multipliers[row] = multiplier;
}

// In lanes the multiplier stands elsewhere.
template <int Of>
void write_values(LaneBlock<int4, Of>& block, int row, const int8_t* values, uint8_t multiplier) {
  for (int i = 0; i < kBlockValues; ++i) {
    const int bits = quotient_bits(values[i], multiplier), four = i / kLaneValues;
    block.values[four % (kFours / 2)][row][i % kLaneValues] |=
        static_cast<uint8_t>(four < kFours / 2 ? bits : bits << 4);
  }
}

}  // namespace
}  // namespace permllm::cpu
