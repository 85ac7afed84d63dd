// AVX-512 for several tokens, up to 16: rows are expanded to a panel in the L1 cache, and 16 bytes
// of a row at a time, broadcast, meet as many of 4 tokens.
//
// A vector of x is 4 tokens x 16 bytes, so that one broadcast serves up to 16 tokens: where a lane
// is a token (avx512/many.h), a single vector of tokens needs a broadcast for every product. While
// one panel is multiplied the next is expanded between the products.
//
// `Products` are those of avx512/few.h with as many vectors of weights as of inputs, and one sum.
// Beside these they have
//   several_chunk_bytes(vectors)  of a row that are expanded at a time, for vectors of 4 tokens
//   several_hint(vectors)         the cache that blocks are fetched into
//   kSeveralAhead                 bytes that they are fetched ahead
#pragma once

#include "cpu/memory/scratch.h"
// The vector code comes last.
#include "cpu/avx512/few.h"

namespace permllm::cpu {
namespace {

constexpr int kPieceBytes = 16;
constexpr int kVectorTokens = sizeof(__m512i) / kPieceBytes;

template <class Products, int Vectors>
class SeveralTokens {
  using Tuning = typename Products::Tuning;
  using BlockOf8 = Block<kRows, typename Products::Value>;
  using Rows = typename Products::Rows;
  using Inputs = typename Products::Inputs;
  using Outputs = typename Products::Outputs;

  static_assert(Products::kWeights == Products::kInputs && Products::kSums == 1);
  static_assert(Tuning::kSeveralTokens == 4 * kVectorTokens);
  static constexpr int kBlockBytes = Products::kInputs * sizeof(__m512i);  // of an expanded row
  static constexpr int kPieces = kBlockBytes / kPieceBytes;
  static constexpr int kPieceInputs = kBlockInputs / kPieces;
  // Rows whose sums fit the registers.
  static constexpr int kPass = kRows * Vectors <= Tuning::kSums ? kRows : kRows / 2;
  static constexpr int64_t kChunkBlocks = Products::several_chunk_bytes(Vectors) / kBlockBytes;
  static constexpr int64_t kPanelRowBytes = kChunkBlocks * kBlockBytes;
  static constexpr int64_t kPanelBytes = kRows * kPanelRowBytes;

  struct Sums {
    __m512i of[kRows][Vectors];
  };

  // Blocks of one row group and where they are expanded to.
  struct Panel {
    const Rows* rows;
    const BlockOf8* blocks;
    int64_t count;
    char* bytes;
  };

 public:
  static constexpr int64_t kPreparedAlone = Tuning::kPreparedAlone;

  explicit SeveralTokens(const LinearArguments& a)
      : arguments_(a),
        blocks_(ceil_div(a.k, kBlockInputs)),
        x_(static_cast<__m512i*>(a.packed_x)),
        inputs_(a),
        outputs_(a, inputs_) {}

  int64_t elements() const { return arguments_.m * arguments_.k; }
  int64_t measures() const { return inputs_.measures(); }
  void measure(int64_t token) const { inputs_.measure(token); }
  int64_t packs() const { return ceil_div(blocks_, Tuning::kPackBlocks); }
  int64_t groups() const { return ceil_div(arguments_.n, kRows); }

  void pack(int64_t item) const {
    const int64_t first = item * Tuning::kPackBlocks;
    const int64_t end =
        blocks_ - first < Tuning::kPackBlocks ? blocks_ : first + Tuning::kPackBlocks;
    for (int64_t b = first; b < end; ++b) {
      for (int v = 0; v < Vectors; ++v) pack_block(b, v);
    }
  }

  void run(int64_t begin, int64_t end) const {
    auto* panels = static_cast<char*>(thread_scratch(Scratch::kPanel, 2 * kPanelBytes));
    const auto* packed = static_cast<const BlockOf8*>(arguments_.packed);
    Rows rows(arguments_, begin), next_rows = rows;
    Panel panel{&rows, packed + begin * blocks_, chunk_count(0), panels};
    expand_from(panel, 0);
    int parity = 0;
    for (int64_t group = begin; group < end; ++group) {
      Sums sums;
      PERMLLM_UNROLL
      for (auto& row : sums.of) {
        PERMLLM_UNROLL
        for (__m512i& sum : row) sum = _mm512_setzero_si512();
      }
      rows.for_each_stray(arguments_.k, [&](int row, int64_t input, auto value) {
        const __m512i weights =
            _mm512_broadcast_i32x4(_mm512_castsi512_si128(only_word(input % kPieceInputs, value)));
        const __m512i* x = x_ + input / kPieceInputs * Vectors;
        for (int v = 0; v < Vectors; ++v) {
          sums.of[row][v] = Products::multiply_one(sums.of[row][v], weights, x[v]);
        }
      });
      if (group + 1 < end) next_rows = Rows(arguments_, group + 1);
      for (int64_t first = 0; first < blocks_; first += kChunkBlocks) {
        const bool last = first + kChunkBlocks >= blocks_;
        parity ^= 1;
        Panel next{last ? &next_rows : &rows, panel.blocks + panel.count,
                   chunk_count(last ? 0 : first + kChunkBlocks), panels + parity * kPanelBytes};
        if (last && group + 1 == end) next.count = 0;
        PERMLLM_UNROLL
        for (int row = 0; row < kRows; row += kPass) {
          multiply(panel, row, x_ + first * kPieces * Vectors, sums, next);
        }
        expand_from(next, panel.count);
        panel = next;
      }
      store(group * kRows, sums);
      rows = next_rows;
      panel.rows = &rows;
    }
  }

 private:
  int64_t chunk_count(int64_t first) const {
    return blocks_ - first < kChunkBlocks ? blocks_ - first : kChunkBlocks;
  }

  // Packed x is [block][piece][vector][4 tokens][16 bytes].
  void pack_block(int64_t block, int vector) const {
    __m512i tokens[kVectorTokens][Products::kInputs];
    for (int t = 0; t < kVectorTokens; ++t) {
      const int64_t token = vector * kVectorTokens + t;
      if (token < arguments_.m) {
        inputs_.load(token, block, tokens[t]);
      } else {
        for (__m512i& inputs : tokens[t]) inputs = _mm512_setzero_si512();
      }
    }
    for (int i = 0; i < Products::kInputs; ++i) {
      const __m512i low01 = _mm512_shuffle_i64x2(tokens[0][i], tokens[1][i], 0x44);
      const __m512i high01 = _mm512_shuffle_i64x2(tokens[0][i], tokens[1][i], 0xee);
      const __m512i low23 = _mm512_shuffle_i64x2(tokens[2][i], tokens[3][i], 0x44);
      const __m512i high23 = _mm512_shuffle_i64x2(tokens[2][i], tokens[3][i], 0xee);
      __m512i* target = x_ + (block * kPieces + i * 4) * Vectors + vector;
      target[0 * Vectors] = _mm512_shuffle_i64x2(low01, low23, 0x88);
      target[1 * Vectors] = _mm512_shuffle_i64x2(low01, low23, 0xdd);
      target[2 * Vectors] = _mm512_shuffle_i64x2(high01, high23, 0x88);
      target[3 * Vectors] = _mm512_shuffle_i64x2(high01, high23, 0xdd);
    }
  }

  static void expand_row(const Panel& panel, int64_t block, int row) {
    __m512i weights[Products::kWeights];
    panel.rows->expand(panel.blocks[block], row, weights);
    char* target = panel.bytes + row * kPanelRowBytes + block * kBlockBytes;
    PERMLLM_UNROLL
    for (int i = 0; i < Products::kWeights; ++i) {
      _mm512_store_si512(target + i * sizeof(__m512i), weights[i]);
    }
  }

  static void expand_from(const Panel& panel, int64_t first) {
    for (int64_t b = first; b < panel.count; ++b) {
      PERMLLM_UNROLL
      for (int r = 0; r < kRows; ++r) expand_row(panel, b, r);
    }
  }

  // Adds the products of rows first..first+kPass-1 of a panel, expands these rows of the next one,
  // and fetches a share of blocks further on.
  static void multiply(const Panel& panel, int first, const __m512i* x, Sums& sums,
                       const Panel& next) {
    constexpr int kShare = sizeof(BlockOf8) * kPass / kRows;
    const char* ahead = reinterpret_cast<const char*>(panel.blocks) + Products::kSeveralAhead +
                        panel.count * kShare * (first / kPass);
    const char* weights = panel.bytes + first * kPanelRowBytes;
    __m512i sum[kPass][Vectors];
    PERMLLM_UNROLL
    for (int r = 0; r < kPass; ++r) {
      PERMLLM_UNROLL
      for (int v = 0; v < Vectors; ++v) sum[r][v] = sums.of[first + r][v];
    }
    const auto multiply_piece = [&]() __attribute__((always_inline)) {
      PERMLLM_UNROLL
      for (int r = 0; r < kPass; ++r) {
        const __m512i row = _mm512_broadcast_i32x4(
            _mm_load_si128(reinterpret_cast<const __m128i*>(weights + r * kPanelRowBytes)));
        PERMLLM_UNROLL
        for (int v = 0; v < Vectors; ++v) sum[r][v] = Products::multiply_one(sum[r][v], row, x[v]);
      }
      weights += kPieceBytes;
      x += Vectors;
    };
    for (int64_t b = 0; b < panel.count; ++b) {
      prefetch<Products::several_hint(Vectors), kShare>(ahead);
      ahead += kShare;
      if (b < next.count) {
        PERMLLM_UNROLL
        for (int p = 0; p < kPieces; ++p) {
          PERMLLM_UNROLL
          for (int r = p * kPass / kPieces; r < (p + 1) * kPass / kPieces; ++r) {
            expand_row(next, b, first + r);
          }
          multiply_piece();
        }
      } else {
        for (int p = 0; p < kPieces; ++p) multiply_piece();
      }
    }
    PERMLLM_UNROLL
    for (int r = 0; r < kPass; ++r) {
      PERMLLM_UNROLL
      for (int v = 0; v < Vectors; ++v) sums.of[first + r][v] = sum[r][v];
    }
  }

  // The totals of rows first..first+3, 128 bits per token.
  static __m512i add_lanes(const Sums& sums, int first, int v) {
    const __m512i a = sums.of[first][v], b = sums.of[first + 1][v];
    const __m512i c = sums.of[first + 2][v], d = sums.of[first + 3][v];
    const __m512i ab = Products::add(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = Products::add(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    return Products::add(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  }

  void store(int64_t row, const Sums& sums) const {
    RowOutputs<Products> rows(arguments_, outputs_, row);
    for (int v = 0; v < Vectors; ++v) {
      alignas(64) __m128i low[kVectorTokens], high[kVectorTokens];
      _mm512_store_si512(low, add_lanes(sums, 0, v));
      _mm512_store_si512(high, add_lanes(sums, 4, v));
      for (int t = 0; t < kVectorTokens && v * kVectorTokens + t < arguments_.m; ++t) {
        const __m256i totals[1] = {_mm256_set_m128i(high[t], low[t])};
        rows.store(totals, v * kVectorTokens + t);
      }
    }
  }

  LinearArguments arguments_;
  int64_t blocks_;
  __m512i* x_;
  Inputs inputs_;
  Outputs outputs_;
};

template <class Products, int Vectors>
void multiply_vectors(const LinearArguments& a, Worker& worker) {
  go_through(SeveralTokens<Products, Vectors>(a), a.last, worker);
}

// 1..16 tokens.
template <class Products>
void multiply_several_tokens(const LinearArguments& a, Worker& worker) {
  const int64_t vectors = ceil_div(a.m, kVectorTokens);
  (vectors == 1   ? multiply_vectors<Products, 1>
   : vectors == 2 ? multiply_vectors<Products, 2>
   : vectors == 3 ? multiply_vectors<Products, 3>
                  : multiply_vectors<Products, 4>)(a, worker);
}

}  // namespace
}  // namespace permllm::cpu
