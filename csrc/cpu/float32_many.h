// Float32 products for many tokens: rows are decoded once to a dense panel in the L1 cache, and a
// register-blocked kernel multiplies it with vectors of tokens.
//
// A lane is a token: weights are read from the row-major panel and broadcast.
#pragma once

#include "phases.h"
#include "scratch.h"
#include "token_blocks.h"

// The vector code comes last.
#include "float32.h"

namespace permllm::cpu {
namespace {

template <class Isa, class Value, class Real>
class ManyTokens {
 public:
  static constexpr int64_t kPreparedAlone = Isa::Tuning::kPreparedAlone;
  static constexpr int64_t kPackedTokens = Isa::Tuning::kPackedTokens;

  explicit ManyTokens(const LinearOf<Real>& a)
      : a_(a),
        blocks_(ceil_div(a.k, kBlockInputs)),
        vectors_(ceil_div(a.m, kLanes)),
        x_(static_cast<float*>(a.packed_x)) {}

  int64_t elements() const { return a_.m * a_.k; }
  static int64_t measures() { return 0; }
  static void measure(int64_t) {}
  int64_t packs() const { return blocks_; }
  int64_t groups() const { return ceil_div(a_.n, kRows); }

  // x as [chunk of inputs][vector of tokens][input][kLanes], zeros where there is none.
  void pack(int64_t block) const {
    for (int64_t vector = 0; vector < vectors_; ++vector) pack_block(block, vector);
  }

  // Row groups begin..end-1, kPanelGroups at a time: all inputs, then out.
  void run(int64_t begin, int64_t end) const {
    const int64_t stride = (vectors_ + 1) * kLanes;  // no power of two: rows share no cache set
    const int64_t sums_bytes = kPanelGroups * kRows * stride * sizeof(float);
    auto* sums = static_cast<float*>(thread_scratch(Scratch::kSums, sums_bytes));
    auto* panel =
        static_cast<float*>(thread_scratch(Scratch::kPanel, kRows * kChunkInputs * sizeof(float)));
    for (int64_t start = begin; start < end; start += kPanelGroups) {
      const int64_t groups = smaller(kPanelGroups, end - start);
      __builtin_memset(sums, 0, sums_bytes);
      for (int64_t block = 0; block < blocks_; block += kChunkBlocks) {
        const int64_t count = smaller(kChunkBlocks, blocks_ - block);
        for (int64_t g = 0; g < groups; ++g) {
          decode_panel(static_cast<const Blocks*>(a_.packed) + (start + g) * blocks_ + block, count,
                       panel);
          multiply_all(panel, block, count * kBlockInputs, sums + g * kRows * stride, stride);
        }
      }
      for (int64_t g = 0; g < groups; ++g) write(start + g, sums + g * kRows * stride, stride);
    }
  }

 private:
  using Vector = typename Isa::Vector;
  using Tuning = typename Isa::Tuning;
  using Blocks = Block<kRows, Value>;

  static constexpr int kLanes = Isa::kLanes;
  static constexpr int64_t kChunkBlocks = Tuning::kManyChunkBlocks;
  static constexpr int64_t kChunkInputs = kChunkBlocks * kBlockInputs;
  static constexpr int64_t kPanelGroups = Tuning::kPanelGroups;

  static constexpr int rows_at_once(int vectors) {
    return kRows * vectors <= Tuning::kSums ? kRows : kRows / 2;
  }

  float* packed_block(int64_t block, int64_t vector) const {
    const int64_t chunk = block / kChunkBlocks;
    const int64_t chunk_blocks = smaller(kChunkBlocks, blocks_ - chunk * kChunkBlocks);
    return x_ + (chunk * kChunkBlocks * vectors_ + vector * chunk_blocks + block % kChunkBlocks) *
                    kBlockInputs * kLanes;
  }

  void pack_block(int64_t block, int64_t vector) const {
    float* target = packed_block(block, vector);
    const int64_t first = block * kBlockInputs;
    const int64_t inputs = smaller(kBlockInputs, a_.k - first);
    const int64_t tokens = smaller(kLanes, a_.m - vector * kLanes);
    if (inputs < kBlockInputs || tokens < kLanes) {
      __builtin_memset(target, 0, kBlockInputs * kLanes * sizeof(float));
    }
    for (int64_t t = 0; t < tokens; ++t) {
      const Real* source = a_.x + (vector * kLanes + t) * a_.x_stride + first;
      for (int64_t i = 0; i < inputs; ++i) target[i * kLanes + t] = to_float(source[i]);
    }
  }

  // `count` blocks of one row group to panel[row][kChunkInputs].
  static void decode_panel(const Blocks* block, int64_t count, float* panel) {
    for (int64_t b = 0; b < count; ++b, ++block, panel += kBlockInputs) {
      for (int r = 0; r < kRows; ++r) {
        decode_row<Isa>(*block, r, panel + r * kChunkInputs);
      }
    }
  }

  // sums[row][token] (rows `stride` floats apart) += panel[row][input] * x[vector][input][token].
  template <int Vectors>
  static void multiply(const float* panel, const float* x, int64_t inputs, float* sums,
                       int64_t stride) {
    constexpr int kRowsAtOnce = rows_at_once(Vectors);
    for (int first = 0; first < kRows; first += kRowsAtOnce) {
      const float* weights = panel + first * kChunkInputs;
      float* target = sums + first * stride;
      Vector sum[kRowsAtOnce][Vectors];
      PERMLLM_UNROLL
      for (int r = 0; r < kRowsAtOnce; ++r) {
        PERMLLM_UNROLL
        for (int v = 0; v < Vectors; ++v)
          sum[r][v] = load<Vector>(target + r * stride + v * kLanes);
      }
      for (int64_t i = 0; i < inputs; ++i) {
        Vector tokens[Vectors];
        PERMLLM_UNROLL
        for (int v = 0; v < Vectors; ++v) tokens[v] = load<Vector>(x + (v * inputs + i) * kLanes);
        PERMLLM_UNROLL
        for (int r = 0; r < kRowsAtOnce; ++r) {
          PERMLLM_UNROLL
          for (int v = 0; v < Vectors; ++v) sum[r][v] += weights[r * kChunkInputs + i] * tokens[v];
        }
      }
      PERMLLM_UNROLL
      for (int r = 0; r < kRowsAtOnce; ++r) {
        PERMLLM_UNROLL
        for (int v = 0; v < Vectors; ++v) store(target + r * stride + v * kLanes, sum[r][v]);
      }
    }
  }

  // All vectors of tokens, some at a time.
  void multiply_all(const float* panel, int64_t first_block, int64_t inputs, float* sums,
                    int64_t stride) const {
    for_each_block<Tuning::kVectors>(vectors_, [&](int64_t vector, auto count) {
      multiply<count>(panel, packed_block(first_block, vector), inputs, sums + vector * kLanes,
                      stride);
    });
  }

  void write(int64_t group, const float* sums, int64_t stride) const {
    const Outputs<Real> out(a_, group, Isa::template kUnit<Value>);
    for (int64_t t = 0; t < a_.m; ++t) {
      for (int r = 0; r < out.rows; ++r) out.write(t, r, sums[r * stride + t]);
    }
  }

  const LinearOf<Real>& a_;
  const int64_t blocks_;
  const int64_t vectors_;
  float* const x_;
};

}  // namespace
}  // namespace permllm::cpu
