// AVX-512 for few tokens whose inputs are brought to the kept values: places and values of a block
// are found in registers and meet a tile of tokens at once.
//
// What is read from memory is the packed weight alone, in order; further tiles find the blocks of a
// row group in L2. A vector of sums is of one token and all rows of a row group.
#pragma once

#include <algorithm>

#include "cpu/threads/phases.h"
// The vector code comes last.
#include "cpu/avx512/kept.h"

namespace permllm::cpu {
namespace {

template <class Products>
class KeptFewTokens {
  using Tuning = typename Products::Tuning;
  using BlockOf8 = SlotBlock<typename Products::Value>;
  using Rows = KeptRows<typename Products::Value>;
  using Inputs = typename Products::Inputs;
  using Outputs = typename Products::Outputs;

  static_assert(Tuning::kKeptFewTokens <= Tuning::kPackedTokens &&
                    Tuning::kKeptFewTokensInt8 <= Tuning::kPackedTokens,
                "there is memory for so many");
  static constexpr int kInputs = Products::kInputs;
  static constexpr int kSums = Products::kSums;

  struct Sums {
    __m512i of[kKeptTile][kSums];
  };

 public:
  static constexpr int64_t kPreparedAlone = Tuning::kPreparedAlone;

  explicit KeptFewTokens(const LinearArguments& a)
      : arguments_(a),
        blocks_(ceil_div(a.k, kBlockInputs)),
        tiles_(a.m),
        x_(static_cast<__m512i*>(a.packed_x)),
        inputs_(a),
        outputs_(a, inputs_) {}

  int64_t elements() const { return arguments_.m * arguments_.k; }
  int64_t measures() const { return inputs_.measures(); }
  void measure(int64_t token) const { inputs_.measure(token); }
  int64_t packs() const { return ceil_div(blocks_, Tuning::kPackBlocks) * tiles_.count(); }
  int64_t groups() const { return ceil_div(arguments_.n, kRows); }

  // Packed x is [tile][block][vector][token].
  void pack(int64_t item) const {
    const auto [token, tokens] = tiles_.tile(item % tiles_.count());
    const int64_t first = item / tiles_.count() * Tuning::kPackBlocks;
    const int64_t end = smaller(blocks_, first + Tuning::kPackBlocks), width = width_of(tokens);
    __m512i* target = tile_of(token) + first * kInputs * width;
    for (int64_t b = first; b < end; ++b, target += kInputs * width) {
      for (int64_t t = 0; t < width; ++t) {
        __m512i vectors[kInputs];
        inputs_.load(token + smaller(t, tokens - 1), b, vectors);
        for (int i = 0; i < kInputs; ++i) target[i * width + t] = vectors[i];
      }
    }
  }

  void run(int64_t begin, int64_t end) const {
    const auto* block = static_cast<const BlockOf8*>(arguments_.packed) + begin * blocks_;
    for (int64_t group = begin; group < end; ++group, block += blocks_) {
      const Rows rows(arguments_, group);
      RowOutputs<Products, true> outputs(arguments_, outputs_, group * kRows);
      for (int64_t tile = 0; tile < tiles_.count(); ++tile) {
        const auto [token, tokens] = tiles_.tile(tile);
        const __m512i* x = tile_of(token);
        Sums sums;
        multiply_tile(rows, block, blocks_, x, width_of(tokens), sums);
        add_strays(rows, x, width_of(tokens), sums);
        for (int64_t t = 0; t < tokens; ++t) store_kept<Products>(outputs, sums.of[t], token + t);
      }
    }
  }

 private:
  // Tokens of a tile, those included that the last one is repeated as.
  int64_t width_of(int64_t tokens) const {
    const int64_t bytes = blocks_ * kInputs * static_cast<int64_t>(sizeof(__m512i));
    const bool alone = tokens == 1 && bytes <= Tuning::kKeptMostAloneBytes;
    return alone ? tokens : std::max<int64_t>(tokens, Products::kLeastVectors / kInputs);
  }

  __m512i* tile_of(int64_t token) const { return x_ + token * blocks_ * kInputs; }

  template <int Tokens = kKeptTile>
  static void multiply_tile(const Rows& rows, const BlockOf8* block, int64_t blocks,
                            const __m512i* x, int64_t tokens, Sums& sums) {
    if constexpr (Tokens > 1) {
      if (tokens < Tokens) {
        return multiply_tile<Tokens - 1>(rows, block, blocks, x, tokens, sums);
      }
    }
    multiply<Tokens>(rows, block, blocks, x, sums);
  }

  template <int Tokens>
  PERMLLM_APART static void multiply(const Rows& all_rows, const BlockOf8* block, int64_t blocks,
                                     const __m512i* x, Sums& sums) {
    constexpr int kBlockBytes = sizeof(BlockOf8);
    constexpr int kFetched = Tokens == 1 && Products::kOneTokenFetch < kBlockBytes
                                 ? Products::kOneTokenFetch
                                 : kBlockBytes;
    constexpr int kAhead = Tokens > 1 ? Tuning::kKeptFewAhead : Tuning::kKeptOneTokenAhead;
    const Rows rows = all_rows;
    __m512i sum[Tokens][kSums];
    PERMLLM_UNROLL
    for (int t = 0; t < Tokens; ++t) {
      PERMLLM_UNROLL
      for (int s = 0; s < kSums; ++s) sum[t][s] = _mm512_setzero_si512();
    }
    for (int64_t b = 0; b < blocks; ++b, ++block, x += kInputs * Tokens) {
      prefetch<Tuning::kFewHint, kFetched>(reinterpret_cast<const char*>(block) + kAhead);
      __m512i places[Rows::kVectors][kSlots], values[Rows::kVectors][kSlots];
      if constexpr (Tokens == 1 && Products::kQuotientsAlone) {
        rows.take_quotients(*block, places[0], values[0]);
        PERMLLM_UNROLL
        for (int i = 0; i < kInputs; ++i) {
          __m512i products = _mm512_setzero_si512();
          PERMLLM_UNROLL
          for (int slot = 0; slot < kSlots; ++slot) {
            products = Products::multiply_kept(products, places[0][slot], values[0][slot], x[i]);
          }
          sum[0][i] = Rows::add_multiples(sum[0][i], products, block->multipliers);
        }
        continue;
      }
      rows.take(*block, places, values);
      PERMLLM_UNROLL
      for (int i = 0; i < kInputs; ++i) {
        const int vector = vector_of<Rows>(i);
        PERMLLM_UNROLL
        for (int t = 0; t < Tokens; ++t) {
          const __m512i inputs = x[i * Tokens + t];
          PERMLLM_UNROLL
          for (int slot = 0; slot < kSlots; ++slot) {
            __m512i& own = sum[t][kSums == 1 ? 0 : i];
            own = Products::multiply_kept(own, places[vector][slot], values[vector][slot], inputs);
          }
        }
      }
    }
    PERMLLM_UNROLL
    for (int t = 0; t < Tokens; ++t) {
      PERMLLM_UNROLL
      for (int s = 0; s < kSums; ++s) sums.of[t][s] = sum[t][s];
    }
  }

  void add_strays(const Rows& rows, const __m512i* x, int64_t tokens, Sums& sums) const {
    rows.for_each_stray(arguments_.k, [&](int row, int64_t input, auto value) {
      const int64_t vector = input / (kBlockInputs / kInputs);
      for (int64_t t = 0; t < tokens; ++t) {
        __m512i& sum = sums.of[t][0];
        sum = add_stray<Products>(sum, row, input, value, x[vector * tokens + t]);
      }
    });
  }

  LinearArguments arguments_;
  int64_t blocks_;
  KeptTiles tiles_;
  __m512i* x_;
  Inputs inputs_;
  Outputs outputs_;
};

}  // namespace
}  // namespace permllm::cpu
