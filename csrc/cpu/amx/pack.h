// Activations into B tiles, and C tiles into outputs. Include after amx/target.h.
#pragma once

#include <immintrin.h>

#include "cpu/kernels.h"
#include "cpu/transpose.h"
#include "cpu/tuning.h"
#include "cpu/words.h"

namespace permllm::cpu {
namespace {

constexpr int kTileColumns = 16;  // tokens of a B or C tile, at most: that of the tile unit
constexpr int kPairBytes = 4;     // two bfloat16 of B, or one float32 of C

constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Columns of a B tile for up to 16 tokens.
constexpr int tile_columns(int64_t tokens) {
  return tokens <= AmxTuning::kNarrowColumns   ? AmxTuning::kNarrowColumns
         : tokens <= AmxTuning::kMiddleColumns ? AmxTuning::kMiddleColumns
                                               : kTileColumns;
}

// Of one B tile: 16 rows of two bfloat16 or four 8-bit inputs for every column.
constexpr int64_t tile_bytes(int columns) { return int64_t{16} * columns * kPairBytes; }

// The vectors of up to 16 tokens, each 16 pairs or quads of inputs, as a B tile.
inline void store_tile(__m512i (&tokens)[16], int columns, char* tile) {
  transpose(tokens);
  const auto kept = static_cast<__mmask16>((1u << columns) - 1);
#pragma GCC unroll 16
  for (int row = 0; row < 16; ++row) {
    _mm512_mask_storeu_epi32(tile + row * columns * kPairBytes, kept, tokens[row]);
  }
}

// 64 inputs from `input` on of `rows` <= 16 rows of x into two B tiles [input pair][column][2],
// zeros where x has no row or no input; reads nothing else.
inline void pack_activations(const LinearArguments& a, int64_t first_row, int64_t rows,
                             int64_t input, int columns, char* tiles) {
  const __mmask32 low = first_lanes(a.k - input), high = first_lanes(a.k - input - 32);
  __m512i first[16], second[16];
#pragma GCC unroll 16
  for (int row = 0; row < 16; ++row) {
    first[row] = second[row] = _mm512_setzero_si512();
    if (row < rows) {
      first[row] = load_row(a, first_row + row, input, low);
      second[row] = load_row(a, first_row + row, input + 32, high);
    }
  }
  store_tile(first, columns, tiles);
  store_tile(second, columns, tiles + tile_bytes(columns));
}

// A stored C tile: [output][token].
struct alignas(64) SumTile {
  float rows[16][kTileColumns];
};

inline void add(SumTile& sums, const SumTile& others) {
  for (int row = 0; row < 16; ++row) {
    _mm512_store_ps(sums.rows[row], _mm512_add_ps(_mm512_load_ps(sums.rows[row]),
                                                  _mm512_load_ps(others.rows[row])));
  }
}

// Up to 32 consecutive outputs: where they go and what is added to them.
class OutputColumns {
 public:
  // To y.
  OutputColumns(const LinearArguments& a, int64_t first)
      : OutputColumns(a, first, a.y + first, a.n) {}

  // To rows that are `stride` apart, a row for each token.
  OutputColumns(const LinearArguments& a, int64_t first, bf16* target, int64_t stride)
      : target_(target),
        stride_(stride),
        valid_(first_lanes(a.n - first)),
        half_(a.half),
        parts_(a.parts) {
    __m512i words = _mm512_setzero_si512();
    if (a.bias != nullptr) words = _mm512_maskz_loadu_epi16(valid_, a.bias + first);
    bias0_ = widen(low_words(words), half_);
    bias1_ = widen(high_words(words), half_);
  }

  // The outputs of a token, whose sums are those of `parts()` rows of x.
  void store(int64_t token, __m512 sums0, __m512 sums1) const {
    _mm512_mask_storeu_epi16(
        target_ + token * stride_, valid_,
        round_words(_mm512_add_ps(sums0, bias0_), _mm512_add_ps(sums1, bias1_), half_));
  }

  int parts() const { return parts_; }

 private:
  bf16* target_;
  int64_t stride_;
  __mmask32 valid_;
  bool half_;
  int parts_;
  __m512 bias0_, bias1_;
};

// The sums of outputs 0..15 and 16..31 for `rows` rows of x from `first_row` on.
inline void store_outputs(const SumTile& sums0, const SumTile& sums1, int64_t first_row,
                          int64_t rows, const OutputColumns& out) {
  __m512i low[16], high[16];
#pragma GCC unroll 16
  for (int row = 0; row < 16; ++row) low[row] = _mm512_load_si512(sums0.rows[row]);
  transpose(low);
#pragma GCC unroll 16
  for (int row = 0; row < 16; ++row) high[row] = _mm512_load_si512(sums1.rows[row]);
  transpose(high);
  const int parts = out.parts();
  for (int64_t row = 0; row < rows; row += parts) {
    __m512 y0 = _mm512_castsi512_ps(low[row]), y1 = _mm512_castsi512_ps(high[row]);
    if (parts == 2) {
      y0 = _mm512_add_ps(y0, _mm512_castsi512_ps(low[row + 1]));
      y1 = _mm512_add_ps(y1, _mm512_castsi512_ps(high[row + 1]));
    }
    out.store((first_row + row) / parts, y0, y1);
  }
}

}  // namespace
}  // namespace permllm::cpu
