// Float32 products for few tokens: rows are decoded in registers and multiplied at once.
//
// A vector holds consecutive inputs of one row; one accumulator per row and token keeps kLanes
// partial sums, which are added up once per output.
#pragma once

#include "phases.h"

// The vector code comes last.
#include "float32.h"

namespace permllm::cpu {
namespace {

template <class Isa, class Value, int Tokens, class Real>
class FewTokens {
 public:
  static constexpr int64_t kPreparedAlone = Isa::Tuning::kPreparedAlone;

  explicit FewTokens(const LinearOf<Real>& a)
      : a_(a), blocks_(ceil_div(a.k, kBlockInputs)), x_(static_cast<float*>(a.packed_x)) {}

  int64_t elements() const { return Tokens * a_.k; }
  static int64_t measures() { return 0; }
  static void measure(int64_t) {}
  int64_t packs() const { return blocks_; }
  int64_t groups() const { return ceil_div(a_.n, kRows); }

  // x as [input block][vector][token][kLanes], zeros past k.
  void pack(int64_t block) const {
    float* packed = x_ + block * Tokens * kBlockInputs;
    for (int64_t first = block * kBlockInputs; first < (block + 1) * kBlockInputs;
         first += kLanes) {
      const int64_t inputs = smaller(a_.k - first, kLanes);
      for (int t = 0; t < Tokens; ++t, packed += kLanes) {
        const Real* source = a_.x + t * a_.x_stride + first;
        for (int lane = 0; lane < kLanes; ++lane) {
          packed[lane] = lane < inputs ? to_float(source[lane]) : 0.0f;
        }
      }
    }
  }

  void run(int64_t begin, int64_t end) const {
    for (int64_t group = begin; group < end; ++group) multiply_group(group);
  }

 private:
  using Vector = typename Isa::Vector;
  using Tuning = typename Isa::Tuning;
  using Blocks = Block<kRows, Value>;
  using Sums = Vector[kRows][Tokens];

  static constexpr int kLanes = Isa::kLanes;
  // Rows that are decoded side by side; the others of the chunk follow, from the L1 cache.
  static constexpr int kRowsAtOnce =
      Tuning::kFewRows * Tokens <= Tuning::kSums ? Tuning::kFewRows : Tuning::kFewRows / 2;
  static constexpr int64_t kChunkBlocks = Tuning::kFewChunkBlocks;

  // Adds the products of rows first..first+kRowsAtOnce-1 of `count` blocks.
  static inline void multiply(const Blocks* block, int64_t count, int first, const float* x,
                              Sums& sums) {
    Vector sum[kRowsAtOnce][Tokens];
    PERMLLM_UNROLL
    for (int r = 0; r < kRowsAtOnce; ++r) {
      PERMLLM_UNROLL
      for (int t = 0; t < Tokens; ++t) sum[r][t] = sums[first + r][t];
    }
    for (const Blocks* end = block + count; block != end; ++block) {
      if (first == 0) {
        const char* ahead = reinterpret_cast<const char*>(block + Tuning::kFewAheadBlocks);
        PERMLLM_UNROLL
        for (size_t line = 0; line < sizeof(Blocks); line += 64) {
          __builtin_prefetch(ahead + line, 0, Tuning::kFewHint);
        }
      }
      PERMLLM_UNROLL
      for (int step = 0; step < kBlockInputs / kLanes; ++step, x += Tokens * kLanes) {
        PERMLLM_UNROLL
        for (int r = 0; r < kRowsAtOnce; ++r) {
          const Vector weights = decode<Isa>(*block, first + r, step * kLanes);
          PERMLLM_UNROLL
          for (int t = 0; t < Tokens; ++t) sum[r][t] += weights * load<Vector>(x + t * kLanes);
        }
      }
    }
    PERMLLM_UNROLL
    for (int r = 0; r < kRowsAtOnce; ++r) {
      PERMLLM_UNROLL
      for (int t = 0; t < Tokens; ++t) sums[first + r][t] = sum[r][t];
    }
  }

  static inline float add_lanes(Vector vector) {
    alignas(64) float lanes[kLanes];
    store(lanes, vector);
    PERMLLM_UNROLL
    for (int half = kLanes / 2; half > 0; half /= 2) {
      PERMLLM_UNROLL
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
  }

  void multiply_group(int64_t group) const {
    const Blocks* block = static_cast<const Blocks*>(a_.packed) + group * blocks_;
    Sums sums = {};
    for (int64_t b = 0; b < blocks_; b += kChunkBlocks) {
      const int64_t count = smaller(kChunkBlocks, blocks_ - b);
      PERMLLM_UNROLL
      for (int first = 0; first < kRows; first += kRowsAtOnce) {
        multiply(block + b, count, first, x_ + b * Tokens * kBlockInputs, sums);
      }
    }
    const Outputs<Real> out(a_, group, Isa::template kUnit<Value>);
    for (int t = 0; t < Tokens; ++t) {
      for (int r = 0; r < out.rows; ++r) out.write(t, r, add_lanes(sums[r][t]));
    }
  }

  const LinearOf<Real>& a_;
  const int64_t blocks_;
  float* const x_;
};

}  // namespace
}  // namespace permllm::cpu
