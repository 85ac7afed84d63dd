// Few tokens, with vectors of any width: rows are decoded in registers and multiplied at once.
//
// A vector holds consecutive inputs of one row; a sum per row, token and part of x keeps kLanes
// partial sums, which are added up once per output.
//
// `Products` says what the values are and how they meet x:
//   Tuning                     the table of constants
//   Real                       of x and y
//   Weights                    where a row group is found (row_groups.h)
//   Vector, Lane, kLanes       kLanes of them to a vector; a lane has 32 bits
//   kInputs                    that a vector of weights holds, and one of x
//   kParts                     vectors that so many inputs of a token are, with a sum each
//   decode(place, row, first)  as many inputs of a row of a block, zeros where pruned
//   multiply(sum, weights, x)  of vectors
//   kOperandsOfX               its instruction takes x from memory
//   Inputs                     constructed from the arguments; measures(), measure(token) for as
//                              many before any load(token, block, parts), which gives a token's 64
//                              inputs, what no weight meets past k
//   Outputs                    OutputRows constructed from the arguments, the Inputs and a row
//                              group; value(token, row, total of each part)
#pragma once

#include <type_traits>

#include "cpu/threads/phases.h"

// The vector code comes last.
#include "cpu/vector/output_rows.h"
#include "cpu/vector/row_groups.h"

namespace permllm::cpu {
namespace {

template <class Products, int Tokens>
class FewTokens {
  using Tuning = typename Products::Tuning;
  using Inputs = typename Products::Inputs;
  using Vector = typename Products::Vector;
  using Lane = typename Products::Lane;
  using Weights = typename Products::Weights;

  static constexpr int kLanes = Products::kLanes;
  static constexpr int kParts = Products::kParts;
  static constexpr int kSteps = kBlockInputs / Products::kInputs;
  static constexpr int kBlockLanes = kSteps * kLanes;  // of a part of a token's x
  static constexpr int64_t kPackedLanes = Tokens * kParts * kBlockLanes;
  // Rows that are decoded side by side; the others of the chunk follow, from the L1 cache.
  static constexpr int kRowsAtOnce =
      Tuning::kFewRows * Tokens * kParts <= Tuning::kSums ? Tuning::kFewRows : Tuning::kFewRows / 2;
  // Of these, whose weights wait in registers for a vector of x that meets them all.
  static constexpr int kTogether = Products::kOperandsOfX ? 1 : kRowsAtOnce;
  static constexpr int64_t kChunkBlocks = Tuning::kFewChunkBlocks;

  // In order: whether registers hold x of a block, and sums of a row that take turns, because each
  // addition of floats waits for the last one.
  static constexpr bool kHoldsX = kSteps * Tokens * kParts <= Tuning::kHeldVectors;
  static constexpr int kChains = kHoldsX && std::is_floating_point_v<Lane> ? 2 : 1;

  using Sums = Vector[kRows][Tokens][kParts];

 public:
  static constexpr int64_t kPreparedAlone = Tuning::kPreparedAlone;

  explicit FewTokens(const LinearOf<typename Products::Real>& a)
      : a_(a),
        blocks_(ceil_div(a.k, kBlockInputs)),
        x_(static_cast<Lane*>(a.packed_x)),
        inputs_(a) {}

  int64_t elements() const { return Tokens * a_.k; }
  int64_t measures() const { return inputs_.measures(); }
  void measure(int64_t token) const { inputs_.measure(token); }
  int64_t packs() const { return blocks_; }
  int64_t groups() const { return ceil_div(a_.n, kRows); }

  // x as [input block][vector][token][part][kLanes].
  void pack(int64_t block) const {
    Lane* packed = x_ + block * kPackedLanes;
    for (int t = 0; t < Tokens; ++t) {
      alignas(64) Lane parts[kParts][kBlockLanes];
      inputs_.load(t, block, parts);
      for (int step = 0; step < kSteps; ++step) {
        for (int p = 0; p < kParts; ++p) {
          Lane* target = packed + ((step * Tokens + t) * kParts + p) * kLanes;
          __builtin_memcpy(target, parts[p] + step * kLanes, sizeof(Vector));
        }
      }
    }
  }

  void run(int64_t begin, int64_t end) const {
    for (int64_t group = begin; group < end; ++group) multiply_group(group);
  }

 private:
  // Adds the products of rows first..first+kRowsAtOnce-1 of `count` blocks, and fetches as many of
  // those ahead.
  inline void multiply(Weights start, Weights ahead, int64_t count, int first, const Lane* x,
                       Sums& sums) const {
    Vector sum[kRowsAtOnce][Tokens][kParts];
    PERMLLM_UNROLL
    for (int r = 0; r < kRowsAtOnce; ++r) {
      PERMLLM_UNROLL
      for (int t = 0; t < Tokens; ++t) {
        PERMLLM_UNROLL
        for (int p = 0; p < kParts; ++p) sum[r][t][p] = sums[first + r][t][p];
      }
    }
    for (int64_t b = 0; b < count; ++b) {
      const Weights place = start + b;
      if (first == 0) (ahead + b).template prefetch<Tuning::kFewHint>();
      PERMLLM_UNROLL
      for (int step = 0; step < kSteps; ++step, x += Tokens * kParts * kLanes) {
        PERMLLM_UNROLL
        for (int r = 0; r < kRowsAtOnce; r += kTogether) {
          if constexpr (Tuning::kLoadsApart && Tokens * kParts > 1) keep_loads_apart();
          Vector weights[kTogether];
          PERMLLM_UNROLL
          for (int j = 0; j < kTogether; ++j) {
            weights[j] = Products::decode(place, first + r + j, step * Products::kInputs);
          }
          PERMLLM_UNROLL
          for (int t = 0; t < Tokens; ++t) {
            PERMLLM_UNROLL
            for (int p = 0; p < kParts; ++p) {
              PERMLLM_UNROLL
              for (int j = 0; j < kTogether; ++j) {
                sum[r + j][t][p] = Products::multiply(sum[r + j][t][p], weights[j],
                                                      load<Vector>(x + (t * kParts + p) * kLanes));
              }
            }
          }
        }
      }
    }
    PERMLLM_UNROLL
    for (int r = 0; r < kRowsAtOnce; ++r) {
      PERMLLM_UNROLL
      for (int t = 0; t < Tokens; ++t) {
        PERMLLM_UNROLL
        for (int p = 0; p < kParts; ++p) sums[first + r][t][p] = sum[r][t][p];
      }
    }
  }

  // Adds the products of all rows of a block, one after the other as they stand in a packed one.
  static inline void multiply_in_order(Weights place, const Lane* x, Sums& sums) {
    constexpr int kVectors = kSteps * Tokens * kParts;
    Vector held[kHoldsX ? kVectors : 1];
    if constexpr (kHoldsX) {
      PERMLLM_UNROLL
      for (int v = 0; v < kVectors; ++v) held[v] = load<Vector>(x + v * kLanes);
    }
    PERMLLM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      keep_loads_apart();
      Vector sum[kChains][Tokens][kParts] = {};
      PERMLLM_UNROLL
      for (int t = 0; t < Tokens; ++t) {
        PERMLLM_UNROLL
        for (int p = 0; p < kParts; ++p) sum[0][t][p] = sums[r][t][p];
      }
      PERMLLM_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        const Vector weights = Products::decode(place, r, step * Products::kInputs);
        PERMLLM_UNROLL
        for (int t = 0; t < Tokens; ++t) {
          PERMLLM_UNROLL
          for (int p = 0; p < kParts; ++p) {
            const int v = (step * Tokens + t) * kParts + p;
            Vector& own = sum[step % kChains][t][p];
            own =
                Products::multiply(own, weights, kHoldsX ? held[v] : load<Vector>(x + v * kLanes));
          }
        }
      }
      PERMLLM_UNROLL
      for (int t = 0; t < Tokens; ++t) {
        PERMLLM_UNROLL
        for (int p = 0; p < kParts; ++p) {
          sums[r][t][p] = kChains == 1 ? sum[0][t][p] : sum[0][t][p] + sum[kChains - 1][t][p];
        }
      }
    }
  }

  static inline Lane add_lanes(Vector vector) {
    typedef Lane Four __attribute__((vector_size(16)));
    Four fours[kLanes / 4];
    __builtin_memcpy(fours, &vector, sizeof(vector));
    PERMLLM_UNROLL
    for (int half = kLanes / 8; half > 0; half /= 2) {
      PERMLLM_UNROLL
      for (int i = 0; i < half; ++i) fours[i] += fours[i + half];
    }
    const Four lanes = fours[0];
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  }

  void multiply_group(int64_t group) const {
    Sums sums = {};
    if constexpr (Tokens <= Tuning::kInOrderTokens) {
      const Weights start(a_, group, 0);
      for (int64_t b = 0; b < blocks_; ++b) {
        const Weights ahead(a_, group, b + Tuning::kFewAheadBlocks);
        ahead.template prefetch<Tuning::kFewHint>();
        multiply_in_order(start + b, x_ + b * kPackedLanes, sums);
      }
      return write(group, sums);
    }
    for (int64_t b = 0; b < blocks_; b += kChunkBlocks) {
      const int64_t count = smaller(kChunkBlocks, blocks_ - b);
      const Weights start(a_, group, b), ahead(a_, group, b + Tuning::kFewAheadBlocks);
      PERMLLM_UNROLL
      for (int first = 0; first < kRows; first += kRowsAtOnce) {
        multiply(start, ahead, count, first, x_ + b * kPackedLanes, sums);
      }
    }
    write(group, sums);
  }

  void write(int64_t group, const Sums& sums) const {
    const typename Products::Outputs out(a_, inputs_, group);
    for (int t = 0; t < Tokens; ++t) {
      for (int r = 0; r < out.rows; ++r) {
        Lane totals[kParts];
        for (int p = 0; p < kParts; ++p) totals[p] = add_lanes(sums[r][t][p]);
        round_to(out.at(t, r), out.value(t, r, totals));
      }
    }
  }

  const LinearOf<typename Products::Real>& a_;
  const int64_t blocks_;
  Lane* const x_;
  const Inputs inputs_;
};

// Least..Most tokens.
template <class Products, int Most, int Least = 1>
void multiply_few_tokens(const LinearOf<typename Products::Real>& a, Worker& worker) {
  if constexpr (Most > Least) {
    if (a.m < Most) return multiply_few_tokens<Products, Most - 1, Least>(a, worker);
  }
  go_through(FewTokens<Products, Most>(a), a.last, worker);
}

}  // namespace
}  // namespace permllm::cpu
