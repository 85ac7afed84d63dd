// AVX-512 for many tokens: rows are expanded once to a dense panel in the cache, and a
// register-blocked kernel multiplies it with vectors of 16 tokens.
//
// A lane is a token. x is packed to steps of 32 bits of inputs x 16 tokens, so that a step of
// weights, read from the row-major panel and broadcast, meets 16 tokens in one instruction:
// expanding needs no shuffle beyond vpexpand, and only the sums are transposed, once per output.
// While one panel is multiplied the next is expanded between the products.
//
// `Products` says what the values are and how they meet x:
//   Tuning                         the table of constants
//   Value, Element                 of the blocks; of a panel and of packed x, 2 bytes or 1
//   Rows                           how a row group is expanded (avx512/expand.h)
//   multiply(sum, tokens, weights) one instruction, 16 sums of 32 bits
//   Inputs                         x as Elements: constructed from the arguments; measures(),
//                                  measure(token) for as many before any
//                                  load(token, first input), which gives 64 bytes in the order
//                                  of the blocks, zeros past k
//   Outputs                        sums as floats: constructed from the arguments and the Inputs,
//                                  convert(sums, row, token vector)
#pragma once

#include "cpu/kernels.h"
#include "cpu/memory/scratch.h"
#include "cpu/threads/phases.h"
#include "cpu/token_blocks.h"
// The vector code comes last.
#include "cpu/avx512/expand.h"
#include "cpu/transpose.h"
#include "cpu/words.h"

namespace permllm::cpu {
namespace {

template <class Products>
class ManyTokens {
  using Tuning = typename Products::Tuning;
  using Value = typename Products::Value;
  using Element = typename Products::Element;
  using Rows = typename Products::Rows;
  using Inputs = typename Products::Inputs;
  using Outputs = typename Products::Outputs;
  using Blocks = const Block<kRows, Value>*;

  static_assert(2 * Tuning::kPartTokens <= Tuning::kSeveralTokens, "no token comes here in parts");
  static constexpr int kStepInputs = 4 / sizeof(Element);
  static constexpr int kBlockSteps = kBlockInputs / kStepInputs;
  static constexpr int kWeights = kBlockInputs * sizeof(Element) / sizeof(__m512i);  // of a row
  static constexpr int kStepElements = kStepInputs * kLanes;                         // 64 bytes
  static constexpr int64_t kChunkBlocks =
      Tuning::kChunkBytes / (kBlockInputs * static_cast<int64_t>(sizeof(Element)));
  static constexpr int kChunkInputs = kChunkBlocks * kBlockInputs;
  static constexpr int kPanelElements = kRows * kChunkInputs;
  static constexpr int64_t kSumRows = Tuning::kPanelGroups * kRows;
  // Bytes of the next chunk of x to fetch with every block of a call that multiplies up to
  // kVectors: all of a chunk's steps together fetch it into L2.
  static constexpr int kFetchedX = Tuning::kVectors * kChunkInputs * kLanes * sizeof(Element) /
                                   (Tuning::kPanelGroups * kChunkBlocks);

  // `count` blocks of one row group, to be expanded to a panel.
  struct Source {
    int64_t group = 0;
    Blocks blocks = nullptr;
    int64_t count = 0;
    Element* panel = nullptr;
  };

  // What happens while a step multiplies: the next panel is expanded, the blocks of a later one
  // (unless null) and a share of the next chunk of x are fetched.
  struct Beside {
    Source next;
    const Rows& rows;  // of it
    Blocks later;
    const char* x;
  };

  // The order in which a thread reads its row groups: a panel of groups, a chunk of inputs of each.
  struct Walk {
    Blocks packed;
    int64_t input_blocks;
    int64_t end;  // of the row groups

    int64_t groups(int64_t start) const { return smaller(Tuning::kPanelGroups, end - start); }

    int64_t steps(int64_t start) const {
      return groups(start) * ceil_div(input_blocks, kChunkBlocks);
    }

    // The blocks of a step of the groups that begin at `start`, or of a step of the following
    // groups when there are not as many; none past the end.
    Source blocks(int64_t start, int64_t step) const {
      if (step >= steps(start)) {
        step -= steps(start);
        start += Tuning::kPanelGroups;
        if (start >= end || step >= steps(start)) return {};
      }
      const int64_t group = start + step % groups(start);
      const int64_t first = step / groups(start) * kChunkBlocks;
      return {group, packed + group * input_blocks + first,
              smaller(kChunkBlocks, input_blocks - first)};
    }
  };

 public:
  static constexpr int64_t kPreparedAlone = Tuning::kPreparedAlone;
  static constexpr int64_t kPackedTokens = Tuning::kPackedTokens;

  explicit ManyTokens(const LinearArguments& a)
      : arguments_(a),
        vectors_(ceil_div(a.m, kLanes)),
        input_blocks_(ceil_div(a.k, kBlockInputs)),
        x_(static_cast<Element*>(a.packed_x)),
        inputs_(a),
        outputs_(a, inputs_) {}

  int64_t elements() const { return arguments_.m * arguments_.k; }
  int64_t measures() const { return inputs_.measures(); }
  void measure(int64_t token) const { inputs_.measure(token); }
  int64_t packs() const { return ceil_div(input_blocks_, kChunkBlocks) * vectors_; }
  int64_t groups() const { return ceil_div(arguments_.n, kRows); }

  // Packed x is [chunk][token vector][step][16 tokens][inputs of a step].
  void pack(int64_t item) const {
    const int64_t first = item / vectors_ * kChunkBlocks, vector = item % vectors_;
    const int64_t inputs = smaller(kChunkBlocks, input_blocks_ - first) * kBlockInputs;
    Element* target = chunk(first) + vector * inputs * kLanes;
    for (int64_t i = 0; i < inputs; i += 16 * kStepInputs, target += 16 * kStepElements) {
      pack_steps(vector, first * kBlockInputs + i, target);
    }
  }

  // Row groups begin..end-1, some at a time: all inputs, then out.
  void run(int64_t begin, int64_t end) const {
    const Walk walk{static_cast<Blocks>(arguments_.packed), input_blocks_, end};
    auto* sums = static_cast<int32_t*>(
        thread_scratch(Scratch::kSums, kSumRows * token_stride() * sizeof(int32_t)));
    auto* panels = static_cast<Element*>(
        thread_scratch(Scratch::kPanel, 2 * kPanelElements * sizeof(Element)));
    int64_t parity = 0;
    Source source = walk.blocks(begin, 0);
    source.panel = panels;
    expand(source, Rows(arguments_, source.group), 0);
    for (int64_t start = begin; start < end; start += Tuning::kPanelGroups) {
      const int64_t groups = walk.groups(start);
      for (int64_t step = 0; step < walk.steps(start); ++step) {
        const int64_t first_block = step / groups * kChunkBlocks;
        const int64_t next_block =
            first_block + source.count < input_blocks_ ? first_block + source.count : 0;
        Source next = walk.blocks(start, step + 1);
        parity ^= 1;
        next.panel = panels + parity * kPanelElements;
        const Rows rows(arguments_, next.group);
        const Beside beside{next, rows, walk.blocks(start, step + Tuning::kManyAhead).blocks,
                            reinterpret_cast<const char*>(chunk(next_block)) +
                                step % groups * token_stride() * kChunkInputs *
                                    static_cast<int64_t>(sizeof(Element)) / groups};
        multiply_all(source, chunk(first_block), sums + step % groups * kRows * token_stride(),
                     first_block == 0, beside);
        expand(next, rows, source.count);
        source = next;
      }
      for (int64_t group = 0; group < groups; ++group) {
        add_strays(start + group, sums + group * kRows * token_stride());
      }
      for (int64_t r = 0; r < groups * kRows; r += 32) {
        const int64_t row = start * kRows + r;
        const int64_t rows = smaller(smaller(32, groups * kRows - r), arguments_.n - row);
        if (rows <= 0) break;
        for (int64_t v = 0; v < vectors_; ++v) {
          store(sums + r * token_stride() + v * kLanes, row, rows, v);
        }
      }
    }
  }

 private:
  int64_t token_stride() const { return vectors_ * kLanes; }

  Element* chunk(int64_t first_block) const {
    return x_ + first_block * kBlockInputs * token_stride();
  }

  // 16 steps of 16 tokens, or of the fewer that are left.
  void pack_steps(int64_t vector, int64_t first_input, Element* target) const {
    __m512i steps[kLanes];
    PERMLLM_UNROLL
    for (int t = 0; t < kLanes; ++t) {
      const int64_t token = vector * kLanes + t;
      steps[t] = token < arguments_.m ? inputs_.load(token, first_input) : _mm512_setzero_si512();
    }
    transpose(steps);
    PERMLLM_UNROLL
    for (int s = 0; s < 16; ++s) _mm512_store_si512(target + s * kStepElements, steps[s]);
  }

  // Blocks first..count-1 to panel[row][kChunkInputs].
  static void expand(const Source& source, const Rows& rows, int64_t first) {
    for (int64_t b = first; b < source.count; ++b) {
      PERMLLM_UNROLL
      for (int r = 0; r < kRows; ++r) expand_row(source, rows, b, r);
    }
  }

  static void expand_row(const Source& source, const Rows& rows, int64_t block, int row) {
    __m512i weights[kWeights];
    rows.expand(source.blocks[block], row, weights);
    Element* target = source.panel + row * kChunkInputs + block * kBlockInputs;
    PERMLLM_UNROLL
    for (int i = 0; i < kWeights; ++i) {
      _mm512_store_si512(target + i * kBlockInputs / kWeights, weights[i]);
    }
  }

  // sums[row][token] of a row group.
  void add_strays(int64_t group, int32_t* sums) const {
    Rows(arguments_, group).for_each_stray(arguments_.k, [&](int row, int64_t input, auto value) {
      const int64_t first = input / kChunkInputs * kChunkBlocks;
      const int64_t steps = smaller(kChunkBlocks, input_blocks_ - first) * kBlockSteps;
      const __m512i weights =
          _mm512_set1_epi32(int32_t{value} << input % kStepInputs * 8 * sizeof(Element));
      const Element* x = chunk(first) + input % kChunkInputs / kStepInputs * kStepElements;
      for (int64_t v = 0; v < vectors_; ++v, x += steps * kStepElements) {
        int32_t* sum = sums + row * token_stride() + v * kLanes;
        _mm512_store_si512(
            sum, Products::multiply(_mm512_load_si512(sum), _mm512_load_si512(x), weights));
      }
    });
  }

  // sums[row][token] (rows token_stride() apart) += panel[row][step] * x[vector][step][token].
  template <int Vectors>
  void multiply(const Source& source, const Element* x, int32_t* sums, bool first,
                Beside& beside) const {
    const int64_t stride = token_stride();
    __m512i sum[kRows][Vectors];
    PERMLLM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      PERMLLM_UNROLL
      for (int v = 0; v < Vectors; ++v) {
        sum[r][v] =
            first ? _mm512_setzero_si512() : _mm512_load_si512(sums + r * stride + v * kLanes);
      }
    }
    const int64_t vector_stride = source.count * kBlockSteps * kStepElements;
    const Element* weights = source.panel;
    const auto multiply_steps = [&](int steps) __attribute__((always_inline)) {
      for (int s = 0; s < steps; ++s, weights += kStepInputs, x += kStepElements) {
        __m512i tokens[Vectors];
        PERMLLM_UNROLL
        for (int v = 0; v < Vectors; ++v) tokens[v] = _mm512_load_si512(x + v * vector_stride);
        PERMLLM_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const __m512i row = broadcast(weights + r * kChunkInputs);
          PERMLLM_UNROLL
          for (int v = 0; v < Vectors; ++v) {
            sum[r][v] = Products::multiply(sum[r][v], tokens[v], row);
          }
        }
      }
    };
    for (int64_t b = 0; b < source.count; ++b) {
      if (beside.later != nullptr) {
        prefetch<Tuning::kManyHint, sizeof(*beside.later)>(
            reinterpret_cast<const char*>(beside.later + b));
      }
      prefetch<Tuning::kManyHintX, kFetchedX>(beside.x);
      beside.x += kFetchedX;
      if (b < beside.next.count) {
        for (int r = 0; r < kRows; ++r) {
          expand_row(beside.next, beside.rows, b, r);
          multiply_steps(kBlockSteps / kRows);
        }
      } else {
        multiply_steps(kBlockSteps);
      }
    }
    PERMLLM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      PERMLLM_UNROLL
      for (int v = 0; v < Vectors; ++v) {
        _mm512_store_si512(sums + r * stride + v * kLanes, sum[r][v]);
      }
    }
  }

  static __m512i broadcast(const Element* step) {
    return _mm512_set1_epi32(*reinterpret_cast<const int __attribute__((may_alias))*>(step));
  }

  // All token vectors, some at a time.
  void multiply_all(const Source& source, const Element* x, int32_t* sums, bool first,
                    Beside beside) const {
    for_each_block<Tuning::kVectors>(vectors_, [&](int64_t vector, auto count) {
      multiply<count>(source, x + vector * source.count * kBlockSteps * kStepElements,
                      sums + vector * kLanes, first, beside);
      beside.next.count = 0;
      beside.later = nullptr;
    });
  }

  // 32 rows x 16 tokens of sums to y, a cache line per token. `rows` of them exist.
  void store(const int32_t* sums, int64_t row, int64_t rows, int64_t vector) const {
    const int64_t stride = token_stride();
    __m512i low[16], high[16];
    PERMLLM_UNROLL
    for (int i = 0; i < 16; ++i) {
      low[i] = _mm512_castps_si512(
          outputs_.convert(_mm512_load_si512(sums + i * stride), row + i, vector));
    }
    PERMLLM_UNROLL
    for (int i = 0; i < 16; ++i) high[i] = _mm512_setzero_si512();
    if (rows > 16) {
      PERMLLM_UNROLL
      for (int i = 0; i < 16; ++i) {
        high[i] = _mm512_castps_si512(
            outputs_.convert(_mm512_load_si512(sums + (16 + i) * stride), row + 16 + i, vector));
      }
    }
    transpose(low);
    transpose(high);
    const auto mask = static_cast<__mmask32>(rows >= 32 ? 0xffffffff : (1u << rows) - 1);
    __m512 bias_low = _mm512_setzero_ps(), bias_high = _mm512_setzero_ps();
    if (arguments_.bias != nullptr) {
      bias_low = load_bias(arguments_.bias + row, static_cast<__mmask16>(mask));
      bias_high = load_bias(arguments_.bias + row + 16, static_cast<__mmask16>(mask >> 16));
    }
    const int64_t count = smaller(kLanes, arguments_.m - vector * kLanes);
    bf16* y = arguments_.y + vector * kLanes * arguments_.n + row;
    for (int64_t t = 0; t < count; ++t, y += arguments_.n) {
      const __m512 y_low = _mm512_add_ps(_mm512_castsi512_ps(low[t]), bias_low);
      const __m512 y_high = _mm512_add_ps(_mm512_castsi512_ps(high[t]), bias_high);
      const __m512i words = round_words(y_low, y_high, arguments_.half);
      _mm512_mask_storeu_epi16(y, mask, words);
    }
  }

  __m512 load_bias(const bf16* bias, __mmask16 mask) const {
    return widen(_mm256_maskz_loadu_epi16(mask, bias), arguments_.half);
  }

  LinearArguments arguments_;
  int64_t vectors_;
  int64_t input_blocks_;
  Element* x_;
  Inputs inputs_;
  Outputs outputs_;
};

}  // namespace
}  // namespace permllm::cpu
