// Many tokens, with vectors of any width: rows are decoded once to a dense panel in the L1 cache,
// and a register-blocked kernel multiplies it with vectors of tokens.
//
// A lane is a token: weights are read from the row-major panel, as many inputs as fill a lane, and
// broadcast.
//
// `Products` are those of vector/few.h with one part, without decode and multiply. They have
//   decode_row(place, row, dense)  the 64 inputs of a row, zeros where pruned
//   multiply(sum, step, tokens)    a lane of weights with a vector of tokens
#pragma once

#include "cpu/memory/scratch.h"
#include "cpu/threads/phases.h"
#include "cpu/token_blocks.h"

// The vector code comes last.
#include "cpu/vector/output_rows.h"
#include "cpu/vector/row_groups.h"

namespace permllm::cpu {
namespace {

template <class Products>
class ManyTokens {
  using Tuning = typename Products::Tuning;
  using Inputs = typename Products::Inputs;
  using Vector = typename Products::Vector;
  using Lane = typename Products::Lane;
  using Weights = typename Products::Weights;

  static_assert(Products::kParts == 1);
  static constexpr int kLanes = Products::kLanes;
  static constexpr int kBlockSteps = kBlockInputs * kLanes / Products::kInputs;
  static constexpr int64_t kChunkBlocks =
      Tuning::kManyChunkBytes / (kBlockSteps * static_cast<int64_t>(sizeof(Lane)));
  static constexpr int64_t kChunkSteps = kChunkBlocks * kBlockSteps;
  static constexpr int64_t kPanelGroups = Tuning::kPanelGroups;

  static constexpr int rows_at_once(int vectors) {
    return kRows * vectors <= Tuning::kSums ? kRows : kRows / 2;
  }

 public:
  static constexpr int64_t kPreparedAlone = Tuning::kPreparedAlone;
  static constexpr int64_t kPackedTokens = Tuning::kPackedTokens;

  explicit ManyTokens(const LinearOf<typename Products::Real>& a)
      : a_(a),
        blocks_(ceil_div(a.k, kBlockInputs)),
        vectors_(ceil_div(a.m, kLanes)),
        x_(static_cast<Lane*>(a.packed_x)),
        inputs_(a) {}

  int64_t elements() const { return a_.m * a_.k; }
  int64_t measures() const { return inputs_.measures(); }
  void measure(int64_t token) const { inputs_.measure(token); }
  int64_t packs() const { return blocks_; }
  int64_t groups() const { return ceil_div(a_.n, kRows); }

  // x as [chunk of inputs][vector of tokens][step][kLanes], zeros where there is no token.
  void pack(int64_t block) const {
    for (int64_t vector = 0; vector < vectors_; ++vector) pack_block(block, vector);
  }

  // Row groups begin..end-1, kPanelGroups at a time: all inputs, then out.
  void run(int64_t begin, int64_t end) const {
    const int64_t stride = (vectors_ + 1) * kLanes;  // no power of two: rows share no cache set
    const int64_t sums_bytes = kPanelGroups * kRows * stride * sizeof(Lane);
    auto* sums = static_cast<Lane*>(thread_scratch(Scratch::kSums, sums_bytes));
    auto* panel =
        static_cast<Lane*>(thread_scratch(Scratch::kPanel, kRows * kChunkSteps * sizeof(Lane)));
    for (int64_t start = begin; start < end; start += kPanelGroups) {
      const int64_t groups = smaller(kPanelGroups, end - start);
      __builtin_memset(sums, 0, sums_bytes);
      for (int64_t block = 0; block < blocks_; block += kChunkBlocks) {
        const int64_t count = smaller(kChunkBlocks, blocks_ - block);
        for (int64_t g = 0; g < groups; ++g) {
          const bool last_group = g + 1 == groups, last_block = block + kChunkBlocks >= blocks_;
          const Weights next = !last_group   ? Weights(a_, start + g + 1, block)
                               : !last_block ? Weights(a_, start, block + kChunkBlocks)
                                             : Weights(a_, start + groups, 0);
          decode_panel(Weights(a_, start + g, block), next, count, panel);
          multiply_all(panel, block, count * kBlockSteps, sums + g * kRows * stride, stride);
        }
      }
      write_groups<kLanes, kPanelGroups>(a_, start, groups, sums, stride, [&](int64_t group) {
        return typename Products::Outputs(a_, inputs_, group);
      });
    }
  }

 private:
  Lane* packed_block(int64_t block, int64_t vector) const {
    const int64_t chunk = block / kChunkBlocks;
    const int64_t chunk_blocks = smaller(kChunkBlocks, blocks_ - chunk * kChunkBlocks);
    return x_ + (chunk * kChunkBlocks * vectors_ + vector * chunk_blocks + block % kChunkBlocks) *
                    kBlockSteps * kLanes;
  }

  void pack_block(int64_t block, int64_t vector) const {
    Lane* target = packed_block(block, vector);
    const int64_t tokens = smaller(kLanes, a_.m - vector * kLanes);
    if (tokens < kLanes) __builtin_memset(target, 0, kBlockSteps * kLanes * sizeof(Lane));
    for (int64_t t = 0; t < tokens; ++t) {
      alignas(64) Lane parts[1][kBlockSteps];
      inputs_.load(vector * kLanes + t, block, parts);
      for (int step = 0; step < kBlockSteps; ++step) target[step * kLanes + t] = parts[0][step];
    }
  }

  // `count` blocks of one row group to panel[row][kChunkSteps], while those after them are fetched.
  static void decode_panel(Weights start, Weights next, int64_t count, Lane* panel) {
    for (int64_t b = 0; b < count; ++b, panel += kBlockSteps) {
      (next + b).template prefetch<Tuning::kManyHint>();
      for (int r = 0; r < kRows; ++r) Products::decode_row(start + b, r, panel + r * kChunkSteps);
    }
  }

  // sums[row][token] (rows `stride` lanes apart) += panel[row][step] * x[vector][step][token].
  template <int Vectors>
  static void multiply(const Lane* panel, const Lane* x, int64_t steps, Lane* sums,
                       int64_t stride) {
    constexpr int kRowsAtOnce = rows_at_once(Vectors);
    for (int first = 0; first < kRows; first += kRowsAtOnce) {
      const Lane* weights = panel + first * kChunkSteps;
      Lane* target = sums + first * stride;
      Vector sum[kRowsAtOnce][Vectors];
      load_sums(target, stride, sum);
      for (int64_t i = 0; i < steps; ++i) {
        Vector tokens[Vectors];
        PERMLLM_UNROLL
        for (int v = 0; v < Vectors; ++v) tokens[v] = load<Vector>(x + (v * steps + i) * kLanes);
        PERMLLM_UNROLL
        for (int r = 0; r < kRowsAtOnce; ++r) {
          const Lane step = weights[r * kChunkSteps + i];
          PERMLLM_UNROLL
          for (int v = 0; v < Vectors; ++v) {
            sum[r][v] = Products::multiply(sum[r][v], step, tokens[v]);
          }
        }
      }
      store_sums(target, stride, sum);
    }
  }

  // All vectors of tokens, some at a time.
  void multiply_all(const Lane* panel, int64_t first_block, int64_t steps, Lane* sums,
                    int64_t stride) const {
    for_each_block<Tuning::kVectors>(vectors_, [&](int64_t vector, auto count) {
      multiply<count>(panel, packed_block(first_block, vector), steps, sums + vector * kLanes,
                      stride);
    });
  }

  const LinearOf<typename Products::Real>& a_;
  const int64_t blocks_;
  const int64_t vectors_;
  Lane* const x_;
  const Inputs inputs_;
};

}  // namespace
}  // namespace permllm::cpu
