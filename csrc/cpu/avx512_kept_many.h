// AVX-512 for many tokens whose inputs are brought to the kept values: places and values of a row
// group are taken to a panel in the L1 cache, some blocks at a time, and meet tiles of tokens
// there.
//
// What pruning left out meets no input: one that is not finite reaches the rows that keep it, and
// no other.
//
// A vector of sums is of two rows and one token, eight partial sums each, which are added up once
// per output.
//
// `Products` are those of avx512_few.h, with one sum. Beside these they have
//   multiply_kept(sum, places, values, x)  one shuffle and one product
#pragma once

#include "scratch.h"
// The vector code comes last.
#include "avx512_few.h"
#include "avx512_kept.h"

namespace permllm::cpu {
namespace {

template <class Products>
class KeptManyTokens {
  using Tuning = typename Products::Tuning;
  using BlockOf8 = Block<kRows, typename Products::Value>;
  using Rows = KeptRows<typename Products::Value>;
  using Inputs = typename Products::Inputs;
  using Outputs = typename Products::Outputs;

  static_assert(Products::kSums == 1 && Tuning::kKeptChunkVectors % Products::kInputs == 0);
  static_assert(Tuning::kKeptPackedTokens <= Tuning::kPackedTokens, "there is memory for so many");
  static constexpr int kVectors = Products::kInputs;  // of x that a token has in a block
  static constexpr int kPairs = kRows / 2;
  static constexpr int kTile = Tuning::kKeptTile;
  static constexpr int64_t kChunkBlocks = Tuning::kKeptChunkVectors / kVectors;

  struct Panel {
    __m512i weights[kChunkBlocks * kVectors][kPairs][2];
  };

 public:
  static constexpr int64_t kPreparedAlone = Tuning::kPreparedAlone;

  explicit KeptManyTokens(const LinearArguments& a)
      : arguments_(a),
        blocks_(ceil_div(a.k, kBlockInputs)),
        tiles_(ceil_div(a.m, kTile)),
        x_(static_cast<__m512i*>(a.packed_x)),
        inputs_(a),
        outputs_(a, inputs_) {}

  int64_t elements() const { return arguments_.m * arguments_.k; }
  int64_t measures() const { return inputs_.measures(); }
  void measure(int64_t token) const { inputs_.measure(token); }
  int64_t packs() const { return ceil_div(blocks_, kChunkBlocks) * tiles_; }
  int64_t groups() const { return ceil_div(arguments_.n, kRows); }

  // Packed x is [chunk][tile][block][vector][token].
  void pack(int64_t item) const {
    const int64_t first = item / tiles_ * kChunkBlocks, token = item % tiles_ * kTile;
    const int64_t count = chunk_count(first), tokens = smaller(kTile, arguments_.m - token);
    __m512i* target = tile_of(first, token);
    for (int64_t b = 0; b < count; ++b, target += kVectors * tokens) {
      for (int64_t t = 0; t < tokens; ++t) {
        __m512i vectors[kVectors];
        inputs_.load(token + t, first + b, vectors);
        for (int i = 0; i < kVectors; ++i) target[i * tokens + t] = vectors[i];
      }
    }
  }

  void run(int64_t begin, int64_t end) const {
    auto* sums = static_cast<__m512i*>(
        thread_scratch(Scratch::kSums, kPairs * arguments_.m * sizeof(__m512i)));
    auto& panel = *static_cast<Panel*>(thread_scratch(Scratch::kPanel, sizeof(Panel)));
    const auto* block = static_cast<const BlockOf8*>(arguments_.packed) + begin * blocks_;
    for (int64_t group = begin; group < end; ++group) {
      const Rows rows(arguments_, group);
      for (int64_t first = 0; first < blocks_; first += kChunkBlocks) {
        const int64_t count = chunk_count(first);
        take(rows, block, count, panel);
        block += count;
        const int64_t next = smaller(kChunkBlocks, (end - group) * blocks_ - first - count);
        for (int64_t tile = 0, fetched = 0; tile < tiles_; ++tile) {
          // A share of the blocks that the panel takes next.
          for (; fetched < next * (tile + 1) / tiles_; ++fetched) {
            prefetch<Tuning::kKeptHint, sizeof(BlockOf8)>(
                reinterpret_cast<const char*>(block + fetched));
          }
          const int64_t token = tile * kTile;
          multiply_tile(panel, count, tile_of(first, token), arguments_.m - token,
                        sums + kPairs * token, first == 0);
        }
      }
      add_strays(rows, sums);
      store(group * kRows, sums);
    }
  }

 private:
  int64_t chunk_count(int64_t first) const { return smaller(kChunkBlocks, blocks_ - first); }

  __m512i* tile_of(int64_t first_block, int64_t token) const {
    return x_ + (first_block * arguments_.m + token * chunk_count(first_block)) * kVectors;
  }

  static void take(const Rows& rows, const BlockOf8* blocks, int64_t count, Panel& panel) {
    for (int64_t b = 0; b < count; ++b) {
      PERMLLM_UNROLL
      for (int p = 0; p < kPairs; ++p) {
        __m512i weights[kVectors][2];
        rows.take(blocks[b], 2 * p, weights);
        PERMLLM_UNROLL
        for (int i = 0; i < kVectors; ++i) {
          panel.weights[b * kVectors + i][p][0] = weights[i][0];
          panel.weights[b * kVectors + i][p][1] = weights[i][1];
        }
      }
    }
  }

  // A whole tile, or the `left` tokens of the last one.
  template <int Tokens = kTile>
  static void multiply_tile(const Panel& panel, int64_t count, const __m512i* x, int64_t left,
                            __m512i* sums, bool first) {
    if constexpr (Tokens > 1) {
      if (left < Tokens) {
        return multiply_tile<Tokens - 1>(panel, count, x, left, sums, first);
      }
    }
    multiply<Tokens>(panel, count * kVectors, x, sums, first);
  }

  // sums[pair][token] += panel[vector][pair] * x[vector][token].
  template <int Tokens>
  static void multiply(const Panel& panel, int64_t count, const __m512i* x, __m512i* sums,
                       bool first) {
    __m512i sum[kPairs][Tokens];
    PERMLLM_UNROLL
    for (int p = 0; p < kPairs; ++p) {
      PERMLLM_UNROLL
      for (int t = 0; t < Tokens; ++t) {
        sum[p][t] = first ? _mm512_setzero_si512() : sums[p * Tokens + t];
      }
    }
    for (int64_t i = 0; i < count; ++i, x += Tokens) {
      PERMLLM_UNROLL
      for (int p = 0; p < kPairs; ++p) {
        const __m512i places = panel.weights[i][p][0], values = panel.weights[i][p][1];
        PERMLLM_UNROLL
        for (int t = 0; t < Tokens; ++t) {
          sum[p][t] = Products::multiply_kept(sum[p][t], places, values, x[t]);
        }
      }
    }
    PERMLLM_UNROLL
    for (int p = 0; p < kPairs; ++p) {
      PERMLLM_UNROLL
      for (int t = 0; t < Tokens; ++t) sums[p * Tokens + t] = sum[p][t];
    }
  }

  // body(first token, tokens, sums) for every tile.
  template <class Body>
  void for_each_tile(__m512i* sums, Body body) const {
    for (int64_t token = 0; token < arguments_.m; token += kTile) {
      body(token, smaller(kTile, arguments_.m - token), sums + kPairs * token);
    }
  }

  void add_strays(const Rows& rows, __m512i* sums) const {
    constexpr int kInputs = kBlockInputs / kVectors, kHalf = kInputs / 2;
    rows.for_each_stray(arguments_.k, [&](int row, int64_t input, auto value) {
      const __m512i places = _mm512_set1_epi16(static_cast<short>(input % kInputs));
      const __m512i values = only_word(row % 2 * kHalf, value);
      const int64_t first = input / kBlockInputs / kChunkBlocks * kChunkBlocks;
      for_each_tile(sums, [&](int64_t token, int64_t tokens, __m512i* own) {
        const int64_t vector = input / kInputs - first * kVectors;
        const __m512i* x = tile_of(first, token) + vector * tokens;
        for (int64_t t = 0; t < tokens; ++t) {
          __m512i& sum = own[row / 2 * tokens + t];
          sum = Products::multiply_kept(sum, places, values, x[t]);
        }
      });
    });
  }

  // The sums of the lanes of four vectors, a row of the row group in each half of them.
  static __m256i add_lanes(const __m512i* sums, int64_t stride) {
    __m512i pairs[2];
    PERMLLM_UNROLL
    for (int i = 0; i < 2; ++i) {
      const __m512i a = sums[2 * i * stride], b = sums[(2 * i + 1) * stride];
      pairs[i] = Products::add(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    }
    // Two quarters of partial sums each, of rows 0, 2, 4, 6 and of rows 1, 3, 5, 7.
    const __m512i quarters = Products::add(_mm512_unpacklo_epi64(pairs[0], pairs[1]),
                                           _mm512_unpackhi_epi64(pairs[0], pairs[1]));
    const __m512i all = Products::add(quarters, _mm512_shuffle_i64x2(quarters, quarters, 0xb1));
    const __m512i order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, all));
  }

  void store(int64_t row, __m512i* sums) const {
    RowOutputs<Products> rows(arguments_, outputs_, row);
    for_each_tile(sums, [&](int64_t token, int64_t tokens, const __m512i* own) {
      for (int64_t t = 0; t < tokens; ++t) {
        const __m256i totals[1] = {add_lanes(own + t, tokens)};
        rows.store(totals, token + t);
      }
    });
  }

  LinearArguments arguments_;
  int64_t blocks_;
  int64_t tiles_;
  __m512i* x_;
  Inputs inputs_;
  Outputs outputs_;
};

// Any number of tokens, in parts of about the same size, whose inputs stay in the cache.
template <class Products>
void multiply_kept_many_tokens(const LinearArguments& a, Worker& worker) {
  constexpr int kTile = Products::Tuning::kKeptTile;
  const int64_t parts = ceil_div(a.m, Products::Tuning::kKeptPackedTokens);
  const int64_t tokens = ceil_div(a.m, parts * kTile) * kTile;
  for (int64_t first = 0; first < a.m; first += tokens) {
    const LinearArguments part = part_of(a, first, smaller(tokens, a.m - first));
    go_through(KeptManyTokens<Products>(part), part.last, worker);
  }
}

}  // namespace
}  // namespace permllm::cpu
