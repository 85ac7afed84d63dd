// Plain C++ for any CPU.
//
// Few tokens: the products of the pruned inputs are skipped, one kept value meets all tokens. Many:
// the float32 kernel with vectors of four.
#include "float32_many.h"

namespace permllm::cpu {
namespace {

// For every mask of eight inputs, the four that it keeps.
struct Kept {
  constexpr Kept() {
    for (int mask = 0; mask < 256; ++mask) {
      int count = 0;
      for (int input = 0; input < 8 && count < 4; ++input) {
        if ((mask >> input & 1) != 0) inputs[mask][count++] = static_cast<uint8_t>(input);
      }
    }
  }

  uint8_t inputs[256][4] = {};
};

constexpr Kept kKept;

struct Portable {
  typedef float Vector __attribute__((vector_size(16), may_alias));
  static constexpr int kLanes = 4;
  static constexpr int kSums = 12;

  template <class Value>
  static constexpr float kUnit = 1.0f;

  // 64 inputs of one row of a block, zeros where pruned.
  template <class Value>
  static void decode_row(const Block<kRows, Value>& block, int row, float* dense) {
    const auto* masks = reinterpret_cast<const uint8_t*>(&block.mask[row]);
    const Value* values = block.values[row];
    __builtin_memset(dense, 0, kBlockInputs * sizeof(float));
    for (int i = 0; i < kBlockInputs / 8; ++i, dense += 8, values += 4) {
      const uint8_t* kept = kKept.inputs[masks[i]];
      PERMLLM_UNROLL
      for (int v = 0; v < 4; ++v) dense[kept[v]] = to_float(values[v]);
    }
  }
};

constexpr int kMostFew = Portable::kLanes;

// `Tokens` is a float for each token of the call, or for four: x is [input], zeros past k.
template <class Tokens, class Value>
void multiply_group(const LinearArguments& a, const Tokens* x, int64_t group) {
  constexpr int kChains = 4;  // sums of one row: an addition takes about as many cycles
  const int64_t blocks = ceil_div(a.k, kBlockInputs);
  const auto* block = static_cast<const Block<kRows, Value>*>(a.packed) + group * blocks;
  Tokens sums[kRows][kChains] = {};
  for (int64_t b = 0; b < blocks; ++b, ++block, x += kBlockInputs) {
    for (int r = 0; r < kRows; ++r) {
      const auto* masks = reinterpret_cast<const uint8_t*>(&block->mask[r]);
      const Value* values = block->values[r];
      Tokens sum[kChains];
      PERMLLM_UNROLL
      for (int v = 0; v < kChains; ++v) sum[v] = sums[r][v];
      PERMLLM_UNROLL
      for (int i = 0; i < kBlockInputs / 8; ++i) {
        const uint8_t* kept = kKept.inputs[masks[i]];
        PERMLLM_UNROLL
        for (int v = 0; v < kChains; ++v) {
          sum[v] += x[8 * i + kept[v]] * to_float(values[4 * i + v]);
        }
      }
      PERMLLM_UNROLL
      for (int v = 0; v < kChains; ++v) sums[r][v] = sum[v];
    }
  }
  const Outputs out(a, group, 1.0f);
  for (int r = 0; r < out.rows; ++r) {
    const Tokens sum = (sums[r][0] + sums[r][1]) + (sums[r][2] + sums[r][3]);
    float tokens[kMostFew] = {};
    __builtin_memcpy(tokens, &sum, sizeof(sum));
    for (int64_t t = 0; t < a.m; ++t) a.y[t * a.n + out.row + r] = out.value(r, tokens[t]);
  }
}

template <class Tokens, class Value>
void few_tokens(const LinearArguments& a) {
  constexpr int64_t kTokens = sizeof(Tokens) / sizeof(float);
  const size_t bytes = ceil_div(a.k, kBlockInputs) * kBlockInputs * sizeof(Tokens);
  auto* x = static_cast<float*>(thread_scratch(Scratch::kActivations, bytes));
  __builtin_memset(x, 0, bytes);
  for (int64_t t = 0; t < a.m; ++t) {
    for (int64_t i = 0; i < a.k; ++i) x[i * kTokens + t] = to_float(a.x[t * a.x_stride + i]);
  }
  const auto* inputs = reinterpret_cast<const Tokens*>(x);
  parallel_for(ceil_div(a.n, kRows), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      multiply_group<Tokens, Value>(a, inputs, group);
    }
  });
}

template <class Value>
void linear(const LinearArguments& a) {
  a.m == 1          ? few_tokens<float, Value>(a)
  : a.m <= kMostFew ? few_tokens<Portable::Vector, Value>(a)
                    : ManyTokens<Portable, Value>::run(a);
}

}  // namespace

void portable(const LinearArguments& a) {
  a.scale != nullptr ? linear<int8_t>(a) : linear<bf16>(a);
}

}  // namespace permllm::cpu
