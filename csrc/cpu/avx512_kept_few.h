// AVX-512 for few tokens whose inputs are brought to the kept values: places and values of a block
// are found in registers and meet all tokens at once.
//
// What is read from memory is the packed weight alone, in order. A vector of sums is of one token
// and all rows of a row group.
#pragma once

#include "phases.h"
// The vector code comes last.
#include "avx512_kept.h"

namespace permllm::cpu {
namespace {

template <class Products, int Tokens>
class KeptFewTokens {
  using Tuning = typename Products::Tuning;
  using BlockOf8 = SlotBlock<typename Products::Value>;
  using Rows = KeptRows<typename Products::Value>;
  using Inputs = typename Products::Inputs;
  using Outputs = typename Products::Outputs;

  static constexpr int kInputs = Products::kInputs;
  static constexpr int kSums = Products::kSums;
  // Of a token, vectors of sums while it is multiplied: products that wait for each other are too
  // slow with the fewest tokens.
  static constexpr int kChains = Tokens <= 2 ? kInputs : kSums;
  static_assert(kChains == kSums || kSums == 1);

  struct Sums {
    __m512i of[Tokens][kSums];
  };

 public:
  static constexpr int64_t kPreparedAlone = Tuning::kPreparedAlone;

  explicit KeptFewTokens(const LinearArguments& a)
      : arguments_(a),
        blocks_(ceil_div(a.k, kBlockInputs)),
        x_(static_cast<__m512i*>(a.packed_x)),
        inputs_(a),
        outputs_(a, inputs_) {}

  int64_t elements() const { return Tokens * arguments_.k; }
  int64_t measures() const { return inputs_.measures(); }
  void measure(int64_t token) const { inputs_.measure(token); }
  int64_t packs() const { return ceil_div(blocks_, Tuning::kPackBlocks); }
  int64_t groups() const { return ceil_div(arguments_.n, kRows); }

  // Packed x is [block][vector][token].
  void pack(int64_t item) const {
    const int64_t first = item * Tuning::kPackBlocks;
    const int64_t end = smaller(blocks_, first + Tuning::kPackBlocks);
    for (int64_t b = first; b < end; ++b) {
      for (int t = 0; t < Tokens; ++t) {
        __m512i vectors[kInputs];
        inputs_.load(t, b, vectors);
        for (int i = 0; i < kInputs; ++i) x_[(b * kInputs + i) * Tokens + t] = vectors[i];
      }
    }
  }

  void run(int64_t begin, int64_t end) const {
    const auto* block = static_cast<const BlockOf8*>(arguments_.packed) + begin * blocks_;
    for (int64_t group = begin; group < end; ++group, block += blocks_) {
      const Rows rows(arguments_, group);
      Sums sums;
      multiply(rows, block, sums);
      rows.for_each_stray(arguments_.k, [&](int row, int64_t input, auto value) {
        const int64_t vector = input / (kBlockInputs / kInputs);
        for (int t = 0; t < Tokens; ++t) {
          __m512i& sum = sums.of[t][0];
          sum = add_stray<Products>(sum, row, input, value, x_[vector * Tokens + t]);
        }
      });
      RowOutputs<Products, Tokens == 1> outputs(arguments_, outputs_, group * kRows);
      for (int t = 0; t < Tokens; ++t) store_kept<Products>(outputs, sums.of[t], t);
    }
  }

 private:
  void multiply(const Rows& rows, const BlockOf8* block, Sums& sums) const {
    constexpr int kFetched = Tokens > 1 ? sizeof(BlockOf8) : Tuning::kKeptOneTokenFetch;
    constexpr int kAhead = Tokens > 1 ? Tuning::kKeptFewAhead : Tuning::kKeptOneTokenAhead;
    __m512i sum[Tokens][kChains];
    PERMLLM_UNROLL
    for (int t = 0; t < Tokens; ++t) {
      PERMLLM_UNROLL
      for (int c = 0; c < kChains; ++c) sum[t][c] = _mm512_setzero_si512();
    }
    const __m512i* x = x_;
    for (int64_t b = 0; b < blocks_; ++b, ++block, x += kInputs * Tokens) {
      prefetch<Tuning::kFewHint, kFetched>(reinterpret_cast<const char*>(block) + kAhead);
      __m512i places[Rows::kVectors][kSlots], values[Rows::kVectors][kSlots];
      rows.take(*block, places, values);
      PERMLLM_UNROLL
      for (int i = 0; i < kInputs; ++i) {
        const int vector = vector_of<Rows>(i);
        PERMLLM_UNROLL
        for (int t = 0; t < Tokens; ++t) {
          const __m512i inputs = x[i * Tokens + t];
          PERMLLM_UNROLL
          for (int slot = 0; slot < kSlots; ++slot) {
            __m512i& own = sum[t][i % kChains];
            own = Products::multiply_kept(own, places[vector][slot], values[vector][slot], inputs);
          }
        }
      }
    }
    PERMLLM_UNROLL
    for (int t = 0; t < Tokens; ++t) {
      PERMLLM_UNROLL
      for (int c = kSums; c < kChains; ++c) sum[t][0] = Products::add(sum[t][0], sum[t][c]);
      PERMLLM_UNROLL
      for (int s = 0; s < kSums; ++s) sums.of[t][s] = sum[t][s];
    }
  }

  LinearArguments arguments_;
  int64_t blocks_;
  __m512i* x_;
  Inputs inputs_;
  Outputs outputs_;
};

// Least..Most tokens.
template <class Products, int Most, int Least = 1>
void multiply_kept_few_tokens(const LinearArguments& a, Worker& worker) {
  if constexpr (Most > Least) {
    if (a.m < Most) return multiply_kept_few_tokens<Products, Most - 1, Least>(a, worker);
  }
  go_through(KeptFewTokens<Products, Most>(a), a.last, worker);
}

}  // namespace
}  // namespace permllm::cpu
