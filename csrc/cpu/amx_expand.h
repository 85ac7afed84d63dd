// Decompression of weight blocks into A tiles. Include after amx_target.h.
#pragma once

#include <immintrin.h>

#include "layout.h"
#include "tuning.h"

namespace permllm::cpu {
namespace {

using Tuning = AmxTuning;
using AmxBlock = Block<kAmxRows>;

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

// The mask is read as two words, because shifting a mask register takes the execution port that the
// expansions need. The values of inputs 32..63 start behind those of 0..31, wherever that is, for a
// mask may keep any 32 of 64 inputs. Their load covers up to 64 bytes past the row (kTailBytes);
// what that adds is not used.
inline void expand_row(const AmxBlock& block, int row, WeightTiles& tiles) {
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

inline void expand_row(const Block<kAmxRows, int8_t>& block, int row, Int8WeightTile& tile) {
  const auto* values = reinterpret_cast<const __m256i*>(block.values[row]);
  const __m512i kept = _mm512_castsi256_si512(_mm256_load_si256(values));
  _mm512_store_si512(tile.rows[row], _mm512_maskz_expand_epi8(block.mask[row], kept));
}

inline void expand_row(const Block<kAmxRows, dense8>& block, int row, Int8WeightTile& tile) {
  _mm512_store_si512(tile.rows[row], _mm512_load_si512(block.values[row]));
}

// Fetches the lines of a block that hold no values.
template <class Value>
inline void prefetch_masks(const Block<kAmxRows, Value>& block) {
  prefetch<Tuning::kFewHint>(block.mask);
  prefetch<Tuning::kFewHint>(block.mask + kAmxRows / 2);
}

inline void prefetch_masks(const Block<kAmxRows, dense8>&) {}

template <class Block, class Tiles>
inline void expand(const Block& block, Tiles& tiles) {
#pragma GCC unroll 16
  for (int row = 0; row < kAmxRows; ++row) expand_row(block, row, tiles);
}

// The same, and fetches the block `ahead`: a line or two for every row, because 18 in a burst would
// take the line buffers that loads need. The empty statement keeps the compiler from moving them.
template <class Block, class Tiles>
inline void expand(const Block& block, Tiles& tiles, const Block* ahead) {
  constexpr int kRowsPerLine = 64 / static_cast<int>(sizeof(ahead->values[0]));
  prefetch_masks(*ahead);
#pragma GCC unroll 16
  for (int row = 0; row < kAmxRows; ++row) {
    if (row % kRowsPerLine == 0) prefetch<Tuning::kFewHint>(ahead->values[row]);
    expand_row(block, row, tiles);
    asm volatile("");
  }
}

}  // namespace
}  // namespace permllm::cpu
