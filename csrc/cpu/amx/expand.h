// Decompression of weight blocks into A tiles. Include after amx/target.h.
#pragma once

#include <immintrin.h>

#include "cpu/avx512/multiples.h"
#include "cpu/avx512/upper_bytes.h"
#include "cpu/kernels.h"
#include "cpu/packing/layout.h"
#include "cpu/tuning.h"

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
template <class Value, bool InTwelveBits = kInTwelveBits<Value>>
class GroupTables {
 public:
  GroupTables() = default;
  GroupTables(const LinearArguments&, int64_t, int64_t = 0) {}

  template <class Tiles>
  void place_strays(int64_t, Tiles&) {}
};

template <class Value>
class GroupTables<Value, true> {
 public:
  GroupTables() = default;
  // Blocks follow each other from `first_block` on.
  GroupTables(const LinearArguments& a, int64_t group, int64_t first_block = 0)
      : strays_(a.behind, group) {
    if (first_block > 0) strays_.skip_to(first_block * kBlockInputs);
    strays_.prefetch_next();
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

  // Where a block was expanded, the values that it lacks.
  void place_strays(int64_t block, WeightTiles& tiles) {
    const int64_t first = block * kBlockInputs;
    strays_.take(kAmxRows, first + kBlockInputs, [&](int row, int64_t input, bf16 value) {
      if (input < first) return;
      tiles.half[(input - first) / kHalfInputs][row][input % kHalfInputs] = value;
    });
  }

  // The entries of a row, in each 128 bits.
  __m512i of_row(int row) const {
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(entries_) + row));
  }

 private:
  // So many in every byte.
  static constexpr int64_t kFirst = 0x0101010101010101, kSecond = 2 * kFirst, kThird = 3 * kFirst;

  static constexpr int64_t kHalfInputs = kBlockInputs / 2;

  __m512i entries_[kAmxRows / 4];
  StrayList strays_;
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

// Words of bytes that stand in the order of twelve_bits.h, those of inputs i and 32 + i side by
// side. None of it takes the port of the expansions.
inline void store_words(__m512i lower, __m512i upper, int row, WeightTiles& tiles) {
  constexpr int kInsideOr = 0xea, kOutsideOr = 0xba;  // a & b | c, a & ~b | c
  const __m512i low_bytes = _mm512_set1_epi16(0xff);
  _mm512_store_si512(
      tiles.half[0][row],
      _mm512_ternarylogic_epi32(lower, low_bytes, _mm512_slli_epi16(upper, 8), kInsideOr));
  _mm512_store_si512(
      tiles.half[1][row],
      _mm512_ternarylogic_epi32(upper, low_bytes, _mm512_srli_epi16(lower, 8), kOutsideOr));
}

inline __m256i load_bytes(const void* bytes) {
  return _mm256_load_si256(static_cast<const __m256i*>(bytes));
}

inline __m512i expand_bytes(__mmask64 mask, __m256i bytes) {
  return _mm512_maskz_expand_epi8(mask, _mm512_castsi256_si512(bytes));
}

inline void expand_row(const Block<kAmxRows, bf12>& block, const GroupTables<bf12>& tables, int row,
                       WeightTiles& tiles) {
  constexpr int kHalf = kAmxRows / 2;
  __m256i index = load_bytes(block.upper[row % kHalf]);
  if (row >= kHalf) index = _mm256_srli_epi16(index, 4);
  const __m256i upper = _mm256_permutexvar_epi8(index, _mm512_castsi512_si256(tables.of_row(row)));
  store_words(expand_bytes(block.mask[row], load_bytes(block.lower[row])),
              expand_bytes(block.mask[row], upper), row, tiles);
}

inline void expand_row(const Block<kAmxRows, dense12>& block, const GroupTables<dense12>& tables,
                       int row, WeightTiles& tiles) {
  constexpr int kHalf = kAmxRows / 2;
  __m512i index = _mm512_load_si512(block.upper[row % kHalf]);
  if (row >= kHalf) index = _mm512_srli_epi16(index, 4);
  const __m512i upper = _mm512_permutexvar_epi8(index, tables.of_row(row));
  store_words(_mm512_load_si512(block.lower[row]), upper, row, tiles);
}

inline void expand_row(const Block<kAmxRows, int8_t>& block, const GroupTables<int8_t>&, int row,
                       Int8WeightTile& tile) {
  _mm512_store_si512(tile.rows[row], expand_bytes(block.mask[row], load_bytes(block.values[row])));
}

inline void expand_row(const Block<kAmxRows, int4>& block, const GroupTables<int4>&, int row,
                       Int8WeightTile& tile) {
  _mm512_store_si512(tile.rows[row], expand_bytes(block.mask[row], multiples_of_row(block, row)));
}

inline void expand_row(const Block<kAmxRows, dense8>& block, const GroupTables<dense8>&, int row,
                       Int8WeightTile& tile) {
  _mm512_store_si512(tile.rows[row], _mm512_load_si512(block.values[row]));
}

// Fetches the lines of a block, in order, some for each of its rows.
template <class Block>
inline void prefetch_share(const Block& block, int row) {
  constexpr int kLine = 64;
  constexpr int kLines = (static_cast<int>(sizeof(Block)) + kLine - 1) / kLine;
  const char* lines = reinterpret_cast<const char*>(&block);
#pragma GCC unroll 2
  for (int line = row * kLines / kAmxRows; line < (row + 1) * kLines / kAmxRows; ++line) {
    prefetch<Tuning::kFewHint>(lines + line * kLine);
  }
}

// A block of this number.
template <class Block, class Tables, class Tiles>
inline void expand(const Block& block, int64_t number, Tables& tables, Tiles& tiles) {
#pragma GCC unroll 16
  for (int row = 0; row < kAmxRows; ++row) expand_row(block, tables, row, tiles);
  tables.place_strays(number, tiles);
}

// The same, and fetches the block `ahead`: in order, because the hardware fetches too, and not
// in a burst, which would take the line buffers that loads need. The empty statement keeps the
// compiler from moving them.
template <class Block, class Tables, class Tiles>
inline void expand(const Block& block, int64_t number, Tables& tables, Tiles& tiles,
                   const Block* ahead) {
#pragma GCC unroll 16
  for (int row = 0; row < kAmxRows; ++row) {
    prefetch_share(*ahead, row);
    expand_row(block, tables, row, tiles);
    asm volatile("");
  }
  tables.place_strays(number, tiles);
}

}  // namespace
}  // namespace permllm::cpu
