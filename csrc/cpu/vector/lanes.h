// Weights in lanes (layout.h), and any number of tokens: inputs are brought to the kept values, so
// that a row has as many products as values.
//
// A lane is a row. One shuffle brings a token's inputs to the values that a vector holds, of all
// rows of a group, and a token's sums of them are one vector.
//
// `Products` says what the values are and how they meet x:
//   Tuning, Real         the table of constants, and the type of x and y
//   Lanes                what a vector holds of a block, and meets; it does not depend on Real:
//     Weights            where its blocks are (row_groups.h)
//     Vector, Lane       kRows of them to a vector
//     kSums              of a token and a row, one for all of x or for each part of it
//     kChains<Tokens>    vectors that take turns as one sum, because an addition waits for the last
//     kSteps, kStepBytes a token's x of a block, in the order that it is used in
//     multiply(place, x, sums) adds the products of a block and of x, [step][token][kStepBytes], to
//                        sums[token][chain][sum]
//   Inputs               constructed from the arguments; measures(), measure(token) for as many
//                        before any load(token, block, bytes), which gives x of a token and a block
//   Outputs              OutputRows constructed from the arguments, the Inputs and a row group;
//                        value(token, row, its sums), which is asked, for nothing, of
//                        rows past the last too
//
// Include after every other header: what follows is compiled for one instruction set.
#pragma once

#include "cpu/threads/phases.h"
#include "cpu/token_blocks.h"

// The vector code comes last.
#include "cpu/vector/output_rows.h"
#include "cpu/vector/row_groups.h"

namespace permllm::cpu {
namespace {

// Adds the products of `count` blocks of a row group to sums[token][sum], and fetches as many of
// those ahead if `fetches`.
template <class Lanes, class Tuning, int Tokens>
__attribute__((noinline)) void multiply_lanes(typename Lanes::Weights place, int64_t count,
                                              const char* x, bool fetches,
                                              typename Lanes::Vector (*sums)[Lanes::kSums]) {
  using Vector = typename Lanes::Vector;
  constexpr int kSums = Lanes::kSums, kChains = Lanes::template kChains<Tokens>;
  constexpr int64_t kAhead = Tuning::kLaneAheadBytes / sizeof(typename Lanes::Weights::Block);
  Vector sum[Tokens][kChains][kSums] = {};
  PERMLLM_UNROLL
  for (int t = 0; t < Tokens; ++t) {
    PERMLLM_UNROLL
    for (int p = 0; p < kSums; ++p) sum[t][0][p] = sums[t][p];
  }
  for (int64_t b = 0; b < count; ++b) {
    if (fetches) (place + (b + kAhead)).template prefetch<Tuning::kLaneHint>();
    Lanes::multiply(place + b, x, sum);
    x += Tokens * Lanes::kSteps * Lanes::kStepBytes;
  }
  PERMLLM_UNROLL
  for (int t = 0; t < Tokens; ++t) {
    PERMLLM_UNROLL
    for (int p = 0; p < kSums; ++p) {
      PERMLLM_UNROLL
      for (int chain = 1; chain < kChains; ++chain) sum[t][0][p] += sum[t][chain][p];
      sums[t][p] = sum[t][0][p];
    }
  }
}

template <class Products>
class LaneTokens {
  using Tuning = typename Products::Tuning;
  using Lanes = typename Products::Lanes;
  using Vector = typename Lanes::Vector;
  using Lane = typename Lanes::Lane;
  using Weights = typename Lanes::Weights;

  static constexpr int kSums = Lanes::kSums;
  static constexpr int kStepBytes = Lanes::kStepBytes;
  static constexpr int64_t kTokenBytes = Lanes::kSteps * kStepBytes;  // of a block
  static constexpr int kTile = Tuning::kLaneTile;
  static constexpr int kPartTokens = Tuning::kLaneTokens;

 public:
  static constexpr int64_t kPreparedAlone = Tuning::kPreparedAlone;
  static constexpr int64_t kPackedTokens = Tuning::kPackedTokens;

  explicit LaneTokens(const LinearOf<typename Products::Real>& a)
      : a_(a),
        blocks_(ceil_div(a.k, kBlockInputs)),
        x_(static_cast<char*>(a.packed_x)),
        inputs_(a) {}

  int64_t elements() const { return a_.m * a_.k; }
  int64_t measures() const { return inputs_.measures(); }
  void measure(int64_t token) const { inputs_.measure(token); }
  int64_t packs() const { return blocks_; }
  int64_t groups() const { return ceil_div(a_.n, kRows); }

  // x as [tile of tokens][input block][step][token][kStepBytes].
  void pack(int64_t block) const {
    for_each_even_part(a_.m, kPartTokens, [&](int64_t start, int64_t tokens) {
      for_each_tile(tokens, [&](int64_t tile, auto count) {
        for (int t = 0; t < count; ++t) {
          alignas(64) char steps[kTokenBytes];
          inputs_.load(start + tile + t, block, steps);
          char* target = packed(start + tile, block, count) + t * kStepBytes;
          for (int step = 0; step < Lanes::kSteps; ++step) {
            __builtin_memcpy(target + step * count * kStepBytes, steps + step * kStepBytes,
                             kStepBytes);
          }
        }
      });
    });
  }

  // For every kPartTokens tokens all row groups, which are read from memory again: x of so many
  // stays in the cache.
  void run(int64_t begin, int64_t end) const {
    for_each_even_part(a_.m, kPartTokens, [&](int64_t start, int64_t tokens) {
      for (int64_t group = begin; group < end; ++group) multiply_group(group, start, tokens);
    });
  }

 private:
  // body(first, BlockOf<count>())
  template <class Body>
  static void for_each_tile(int64_t tokens, Body body) {
    for_each_even_part(tokens, kTile, [&](int64_t first, int64_t count) {
      with_block_of<kTile>(count, [&](auto known) { body(first, known); });
    });
  }

  char* packed(int64_t first, int64_t block, int64_t tokens) const {
    return x_ + (first * blocks_ + block * tokens) * kTokenBytes;
  }

  // The blocks that tiles share stay in the L1 cache.
  void multiply_group(int64_t group, int64_t start, int64_t tokens) const {
    Vector sums[kPartTokens][kSums] = {};
    const int64_t chunk = tokens <= kTile ? blocks_ : Tuning::kLaneChunkBlocks;
    for (int64_t b = 0; b < blocks_; b += chunk) {
      const Weights place(a_, group, b);
      const int64_t blocks = smaller(chunk, blocks_ - b);
      for_each_tile(tokens, [&](int64_t tile, auto count) {
        multiply_lanes<Lanes, Tuning, count>(place, blocks, packed(start + tile, b, count),
                                             tile == 0, sums + tile);
      });
    }
    const typename Products::Outputs out(a_, inputs_, group);
    for (int64_t t = 0; t < tokens; ++t) write(out, start + t, sums[t]);
  }

  static void write(const typename Products::Outputs& out, int64_t token,
                    const Vector (&sums)[kSums]) {
    alignas(64) Lane parts[kSums][kRows];
    for (int p = 0; p < kSums; ++p) store(parts[p], sums[p]);
    float values[kRows];
    for (int r = 0; r < kRows; ++r) {
      Lane totals[kSums];
      for (int p = 0; p < kSums; ++p) totals[p] = parts[p][r];
      values[r] = out.value(token, r, totals);
    }
    typename Products::Real rounded[kRows];
    for (int r = 0; r < kRows; ++r) round_to(rounded[r], values[r]);
    auto* target = &out.at(token, 0);
    if (out.rows == kRows) {
      __builtin_memcpy(target, rounded, sizeof(rounded));  // of a size that the compiler knows
    } else {
      __builtin_memcpy(target, rounded, out.rows * sizeof(rounded[0]));
    }
  }

  const LinearOf<typename Products::Real>& a_;
  const int64_t blocks_;
  char* const x_;
  const typename Products::Inputs inputs_;
};

}  // namespace
}  // namespace permllm::cpu
