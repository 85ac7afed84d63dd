// Decompression of weight blocks into A tiles. Include after amx_target.h.
#pragma once

#include <immintrin.h>

#include "kernels.h"
#include "layout.h"
#include "tuning.h"
#include "upper_bytes.h"

namespace permllm::cpu {
namespace {

using Tuning = AmxTuning;

// One block, dense: inputs 0..31 and inputs 32..63 of 16 rows, each an A tile.
struct alignas(64) WeightTiles {
  bf16 half[2][kAmxRows][kBlockInputs / 2];
};

// One block of int8 values, dense: 64 inputs of 16 rows are one A tile.
struct alignas(64) Int8WeightTile {
  int8_t rows[kAmxRows][kBlockInputs];
};

template <int Hint>
inline void prefetch(const void* line) {
  __builtin_prefetch(line, 0, Hint);
}

// What the blocks of a row group are expanded with, beside themselves: nothing, but for 12 bits.
template <class Value>
class GroupTables {
 public:
  GroupTables() = default;
  GroupTables(const LinearArguments&, int64_t) {}
};

template <>
class GroupTables<bf12> {
 public:
  GroupTables() = default;
  GroupTables(const LinearArguments& a, int64_t group) {
    constexpr int64_t kPairsAhead = 4, kGroupsAhead = kAmxGroups * kPairsAhead;
    const uint8_t* largest = a.behind.largest + group * kAmxRows;
    prefetch<kIntoL1>(largest + kGroupsAhead * kAmxRows);
    prefetch<kIntoL1>(a.behind.first_stray + group + kGroupsAhead);
    const __m128i rows = _mm_loadu_si128(reinterpret_cast<const __m128i*>(largest));
    // Each 128 bits are about one row.
    __m512i place = _mm512_set_epi64(kThird, kThird, kSecond, kSecond, kFirst, kFirst, 0, 0);
    for (__m512i& four : entries_) {
      four = upper_entries(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(rows), place));
      place = _mm512_add_epi8(place, _mm512_set1_epi8(4));
    }
  }

  // Twice, for the halves of a vector.
  __m256i of_row(int row) const {
    return _mm256_broadcastsi128_si256(
        _mm_load_si128(reinterpret_cast<const __m128i*>(entries_) + row));
  }

 private:
  // So many in every byte.
  static constexpr int64_t kFirst = 0x0101010101010101, kSecond = 2 * kFirst, kThird = 3 * kFirst;

  __m512i entries_[kAmxRows / 4];
};

// The mask is read as two words, because shifting a mask register takes the execution port that the
// expansions need. The values of inputs 32..63 start behind those of 0..31, wherever that is, for a
// mask may keep any 32 of 64 inputs. Their load covers up to 64 bytes past the row (kTailBytes);
// what that adds is not used.
inline void expand_row(const Block<kAmxRows>& block, const GroupTables<bf16>&, int row,
                       WeightTiles& tiles) {
  uint32_t mask[2];
  __builtin_memcpy(&mask[0], reinterpret_cast<const char*>(&block.mask[row]), 4);
  __builtin_memcpy(&mask[1], reinterpret_cast<const char*>(&block.mask[row]) + 4, 4);
  const bf16* values = block.values[row];
  const __m512i low = _mm512_maskz_expand_epi16(mask[0], _mm512_load_si512(values));
  const __m512i high =
      _mm512_maskz_expand_epi16(mask[1], _mm512_loadu_si512(values + __builtin_popcount(mask[0])));
  _mm512_store_si512(tiles.half[0][row], low);
  _mm512_store_si512(tiles.half[1][row], high);
}

// Both bytes are expanded apart, those of inputs i and 32 + i to a word: what makes words of a
// value of them takes another port than expansions do.
inline void expand_row(const Block<kAmxRows, bf12>& block, const GroupTables<bf12>& tables, int row,
                       WeightTiles& tiles) {
  constexpr int kHalf = kAmxRows / 2;
  const auto load = [](const void* bytes) {
    return _mm256_load_si256(static_cast<const __m256i*>(bytes));
  };
  __m256i index = load(block.upper[row % kHalf]);
  if (row >= kHalf) index = _mm256_srli_epi16(index, 4);
  const __mmask64 mask = block.mask[row];
  const __m512i lower =
      _mm512_maskz_expand_epi8(mask, _mm512_castsi256_si512(load(block.lower[row])));
  const __m256i bytes = _mm256_permutexvar_epi8(index, tables.of_row(row));
  const __m512i upper = _mm512_maskz_expand_epi8(mask, _mm512_castsi256_si512(bytes));
  constexpr int kInsideOr = 0xea, kOutsideOr = 0xba;  // a & b | c, a & ~b | c
  const __m512i low_bytes = _mm512_set1_epi16(0xff);
  const __m512i first =
      _mm512_ternarylogic_epi32(lower, low_bytes, _mm512_slli_epi16(upper, 8), kInsideOr);
  const __m512i second =
      _mm512_ternarylogic_epi32(upper, low_bytes, _mm512_srli_epi16(lower, 8), kOutsideOr);
  _mm512_store_si512(tiles.half[0][row], first);
  _mm512_store_si512(tiles.half[1][row], second);
}

inline void expand_row(const Block<kAmxRows, int8_t>& block, const GroupTables<int8_t>&, int row,
                       Int8WeightTile& tile) {
  const auto* values = reinterpret_cast<const __m256i*>(block.values[row]);
  const __m512i kept = _mm512_castsi256_si512(_mm256_load_si256(values));
  _mm512_store_si512(tile.rows[row], _mm512_maskz_expand_epi8(block.mask[row], kept));
}

inline void expand_row(const Block<kAmxRows, dense8>& block, const GroupTables<dense8>&, int row,
                       Int8WeightTile& tile) {
  _mm512_store_si512(tile.rows[row], _mm512_load_si512(block.values[row]));
}

// Fetches the lines of a block that hold no values.
template <class Value>
inline void prefetch_masks(const Block<kAmxRows, Value>& block) {
  prefetch<Tuning::kFewHint>(block.mask);
  prefetch<Tuning::kFewHint>(block.mask + kAmxRows / 2);
}

inline void prefetch_masks(const Block<kAmxRows, dense8>&) {}

// The line that begins with this row of values, if one does.
template <class Value>
inline void prefetch_row(const Block<kAmxRows, Value>& block, int row) {
  constexpr int kRowsPerLine = 64 / static_cast<int>(sizeof(block.values[0]));
  if (row % kRowsPerLine == 0) prefetch<Tuning::kFewHint>(block.values[row]);
}

inline void prefetch_row(const Block<kAmxRows, bf12>& block, int row) {
  constexpr int kRowsPerLine = 64 / kBlockValues;
  if (row % kRowsPerLine == 0) prefetch<Tuning::kFewHint>(block.lower[row]);
  if (row % (2 * kRowsPerLine) == 0) prefetch<Tuning::kFewHint>(block.upper[row / 2]);
}

template <class Block, class Tables, class Tiles>
inline void expand(const Block& block, const Tables& tables, Tiles& tiles) {
#pragma GCC unroll 16
  for (int row = 0; row < kAmxRows; ++row) expand_row(block, tables, row, tiles);
}

// The same, and fetches the block `ahead`: a line or two for every row, because 18 in a burst would
// take the line buffers that loads need. The empty statement keeps the compiler from moving them.
template <class Block, class Tables, class Tiles>
inline void expand(const Block& block, const Tables& tables, Tiles& tiles, const Block* ahead) {
  prefetch_masks(*ahead);
#pragma GCC unroll 16
  for (int row = 0; row < kAmxRows; ++row) {
    prefetch_row(*ahead, row);
    expand_row(block, tables, row, tiles);
    asm volatile("");
  }
}

}  // namespace
}  // namespace permllm::cpu
