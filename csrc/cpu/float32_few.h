// Float32 products for few tokens: rows are decoded in registers and multiplied at once.
//
// A vector holds consecutive inputs of one row; one accumulator per row and token keeps kLanes
// partial sums, which are added up once per output.
#pragma once

#include "scratch.h"
#include "threads.h"

// The vector code comes last.
#include "float32.h"

namespace permllm::cpu {
namespace {

template <class Isa, class Value, int Tokens>
class FewTokens {
 public:
  template <class Real>
  static void run(const LinearOf<Real>& a) {
    const int64_t blocks = ceil_div(a.k, kBlockInputs);
    auto* x = static_cast<float*>(
        thread_scratch(Scratch::kActivations, Tokens * blocks * kBlockInputs * sizeof(float)));
    pack_activations(a, x);
    parallel_for(ceil_div(a.n, kRows), [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) multiply_group(a, blocks, x, group);
    });
  }

 private:
  using Vector = typename Isa::Vector;
  using Blocks = Block<kRows, Value>;
  using Sums = Vector[kRows][Tokens];

  static constexpr int kLanes = Isa::kLanes;
  // Rows that are decoded side by side; the others of the chunk follow, from the L1 cache.
  static constexpr int kRowsAtOnce = 4 * Tokens <= Isa::kSums ? 4 : 2;
  static constexpr int64_t kChunkBlocks = 8;
  static constexpr int64_t kAheadBlocks = 16;  // fetched so many blocks before they are used
  static constexpr int kIntoL2 = 2;            // as __builtin_prefetch counts

  // x as [input block][vector][token][kLanes], zeros past k.
  template <class Real>
  static void pack_activations(const LinearOf<Real>& a, float* packed) {
    for (int64_t first = 0; first < ceil_div(a.k, kBlockInputs) * kBlockInputs; first += kLanes) {
      const int64_t inputs = smaller(a.k - first, kLanes);
      for (int t = 0; t < Tokens; ++t, packed += kLanes) {
        const Real* source = a.x + t * a.x_stride + first;
        for (int lane = 0; lane < kLanes; ++lane) {
          packed[lane] = lane < inputs ? to_float(source[lane]) : 0.0f;
        }
      }
    }
  }

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
        const char* ahead = reinterpret_cast<const char*>(block + kAheadBlocks);
        PERMLLM_UNROLL
        for (size_t line = 0; line < sizeof(Blocks); line += 64) {
          __builtin_prefetch(ahead + line, 0, kIntoL2);
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

  template <class Real>
  static void multiply_group(const LinearOf<Real>& a, int64_t blocks, const float* x,
                             int64_t group) {
    const Blocks* block = static_cast<const Blocks*>(a.packed) + group * blocks;
    Sums sums = {};
    for (int64_t b = 0; b < blocks; b += kChunkBlocks) {
      const int64_t count = smaller(kChunkBlocks, blocks - b);
      PERMLLM_UNROLL
      for (int first = 0; first < kRows; first += kRowsAtOnce) {
        multiply(block + b, count, first, x + b * Tokens * kBlockInputs, sums);
      }
    }
    const Outputs<Real> out(a, group, Isa::template kUnit<Value>);
    for (int t = 0; t < Tokens; ++t) {
      for (int r = 0; r < out.rows; ++r) out.write(t, r, add_lanes(sums[r][t]));
    }
  }
};

}  // namespace
}  // namespace permllm::cpu
