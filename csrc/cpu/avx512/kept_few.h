// AVX-512 for few tokens whose inputs are brought to the kept values: places and values of a block
// are found in registers and meet a tile of tokens at once.
//
// What is read from memory is the packed weight alone, in order; further tiles find the blocks of a
// row group in L2. A vector of sums is of one token and all rows of a row group.
#pragma once

#include <type_traits>

#include "cpu/threads/phases.h"
// The vector code comes last.
#include "cpu/avx512/kept.h"

namespace permllm::cpu {
namespace {

template <class Products>
class KeptFewTokens {
  using Tuning = typename Products::Tuning;
  using Value = typename Products::Value;
  using BlockOf16 = GroupedBlock<Value>;
  using Rows = KeptRows<Value>;
  using Inputs = typename Products::Inputs;
  using Outputs = typename Products::Outputs;

  static_assert(Tuning::kKeptFewTokens <= Tuning::kPackedTokens &&
                    Tuning::kKeptFewTokensInt8 <= Tuning::kPackedTokens,
                "there is memory for so many");
  static constexpr int kInputs = Products::kInputs;
  static constexpr int kPlanes = Products::kPlanes;
  // To multiply sums takes two instructions for each of them and half a block, to multiply values
  // some 40 for a block.
  static constexpr int kMostQuotients = std::is_same_v<Value, int4> ? 8 : 0;  // sums
  static_assert(Products::kSums == kPlanes);

  struct Sums {
    __m512i of[kKeptTile][kPlanes];
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
  int64_t groups() const { return ceil_div(arguments_.n, kGroupedRows); }

  // Packed x is [tile][block][vector][token].
  void pack(int64_t item) const {
    const auto [token, tokens] = tiles_.tile(item % tiles_.count());
    const int64_t first = item / tiles_.count() * Tuning::kPackBlocks;
    const int64_t end = smaller(blocks_, first + Tuning::kPackBlocks);
    __m512i* target = tile_of(token) + first * kInputs * tokens;
    for (int64_t b = first; b < end; ++b, target += kInputs * tokens) {
      for (int64_t t = 0; t < tokens; ++t) {
        __m512i vectors[kInputs];
        inputs_.load(token + t, b, vectors);
        for (int i = 0; i < kInputs; ++i) target[i * tokens + t] = vectors[i];
      }
    }
  }

  void run(int64_t begin, int64_t end) const {
    const auto* block = static_cast<const BlockOf16*>(arguments_.packed) + begin * blocks_;
    for (int64_t group = begin; group < end; ++group, block += blocks_) {
      const Rows rows(arguments_, group);
      GroupedOutputs<Products, true> outputs(arguments_, outputs_, group * kGroupedRows);
      for (int64_t tile = 0; tile < tiles_.count(); ++tile) {
        const auto [token, tokens] = tiles_.tile(tile);
        const __m512i* x = tile_of(token);
        Sums sums;
        multiply_tile(rows, block, blocks_, x, tokens, sums);
        add_strays(rows, x, tokens, sums);
        for (int64_t t = 0; t < tokens; ++t) outputs.store(sums.of[t], token + t);
      }
    }
  }

 private:
  __m512i* tile_of(int64_t token) const { return x_ + token * blocks_ * kInputs; }

  template <int Tokens = kKeptTile>
  static void multiply_tile(const Rows& rows, const BlockOf16* block, int64_t blocks,
                            const __m512i* x, int64_t tokens, Sums& sums) {
    if constexpr (Tokens > 1) {
      if (tokens < Tokens) {
        return multiply_tile<Tokens - 1>(rows, block, blocks, x, tokens, sums);
      }
    }
    multiply<Tokens>(rows, block, blocks, x, sums);
  }

  template <int Tokens>
  PERMLLM_APART static void multiply(const Rows& all_rows, const BlockOf16* block, int64_t blocks,
                                     const __m512i* x, Sums& sums) {
    constexpr int kBlockBytes = sizeof(BlockOf16);
    constexpr int kFetched = Tokens == 1 && Products::kOneTokenFetch < kBlockBytes
                                 ? Products::kOneTokenFetch
                                 : kBlockBytes;
    constexpr int kAhead = Tokens > 1 ? Tuning::kKeptFewAhead : Tuning::kKeptOneTokenAhead;
    constexpr bool kQuotients = Tokens * kPlanes <= kMostQuotients;
    const Rows rows = all_rows;
    __m512i sum[Tokens][kPlanes];
    PERMLLM_UNROLL
    for (int t = 0; t < Tokens; ++t) {
      PERMLLM_UNROLL
      for (int s = 0; s < kPlanes; ++s) sum[t][s] = _mm512_setzero_si512();
    }
    using Taken = typename Rows::Block;
    // Past the last block stands what is behind the blocks, whose places meet nothing.
    Taken taken(rows, *block);
    PartVectors places;
    taken.take_places(0, places);
    for (int64_t b = 0; b < blocks; ++b, ++block, x += kInputs * Tokens) {
      prefetch<Tuning::kFewHint, kFetched>(reinterpret_cast<const char*>(block) + kAhead);
      Taken next(rows, block[1]);
      PERMLLM_UNROLL
      for (int part = 0; part < Rows::kParts; ++part) {
        PartVectors next_places, values;
        if (part + 1 < Rows::kParts) {
          taken.take_places(part + 1, next_places);
        } else {
          next.take_places(0, next_places);
        }
        if constexpr (kQuotients) {
          taken.take_quotients(part, values);
        } else {
          taken.take_values(part, values);
        }
        PERMLLM_UNROLL
        for (int plane = 0; plane < kPlanes; ++plane) {
          PERMLLM_UNROLL
          for (int t = 0; t < Tokens; ++t) {
            const __m512i inputs = x[(Rows::vector_of_x(part) + plane) * Tokens + t];
            if constexpr (kQuotients) {
              const __m512i products =
                  multiply_part(places, values, inputs, _mm512_setzero_si512());
              sum[t][plane] = taken.add_multiples(sum[t][plane], products);
            } else {
              sum[t][plane] = multiply_part(places, values, inputs, sum[t][plane]);
            }
          }
        }
        PERMLLM_UNROLL
        for (int i = 0; i < kPartVectors; ++i) places[i] = next_places[i];
      }
      taken = next;
    }
    PERMLLM_UNROLL
    for (int t = 0; t < Tokens; ++t) {
      PERMLLM_UNROLL
      for (int s = 0; s < kPlanes; ++s) sums.of[t][s] = sum[t][s];
    }
  }

  // Adds the products of a part with a token's inputs.
  static __m512i multiply_part(const PartVectors& places, const PartVectors& values, __m512i x,
                               __m512i sum) {
    PERMLLM_UNROLL
    for (int i = 0; i < kPartVectors; ++i) {
      sum = Products::multiply_kept(sum, places[i], values[i], x);
    }
    return sum;
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
