// Plain C++ for any CPU: rows are expanded to float32 a chunk of inputs at a time, then multiplied
// with every token in loops that compilers vectorise.
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "scratch.h"
#include "threads.h"

namespace permllm::cpu {
namespace {

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define PERMLLM_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define PERMLLM_CLONES
#endif

constexpr int kRows = kPortableRows;
constexpr int64_t kChunkBlocks = 8;  // 8 rows x 512 inputs of float32: half of a 32 KiB cache
constexpr int64_t kTokenGroup = 64;  // tokens whose sums are kept while the inputs are walked

// Eight partial sums, combined in a fixed order. Compilers map it to what the CPU has.
constexpr int kLanes = 8;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

inline float to_float(bf16 value) {
  const uint32_t bits = uint32_t{value} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<bf16>(bits >> 16 | 0x40);  // a quiet NaN
  return static_cast<bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Blocks of one row group to dense[row][inputs], zeros where pruned.
inline void expand(const Block<kRows>* blocks, int64_t count, float* dense) {
  const int64_t inputs = count * kBlockInputs;
  std::memset(dense, 0, kRows * inputs * sizeof(float));
  for (int64_t b = 0; b < count; ++b) {
    for (int r = 0; r < kRows; ++r) {
      float* target = dense + r * inputs + b * kBlockInputs;
      const bf16* value = blocks[b].values[r];
      const bf16* end = value + kBlockValues;
      for (uint64_t rest = blocks[b].mask[r]; rest != 0 && value != end; rest &= rest - 1) {
        target[__builtin_ctzll(rest)] = to_float(*value++);
      }
    }
  }
}

// sums[row] += dense[row][inputs] * x[inputs]
inline void multiply(const float* dense, const float* x, int64_t inputs, float* sums) {
  Lanes partial[kRows] = {};
  for (int64_t i = 0; i < inputs; i += kLanes) {
    Lanes inputs_lanes;
    std::memcpy(&inputs_lanes, x + i, sizeof(Lanes));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Lanes weights;
      std::memcpy(&weights, dense + r * inputs + i, sizeof(Lanes));
      partial[r] += weights * inputs_lanes;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) partial[r][lane] += partial[r][lane + half];
    }
    sums[r] += partial[r][0];
  }
}

// All inputs of one row group and up to kTokenGroup tokens: x is [tokens][inputs], padded.
PERMLLM_CLONES
void multiply_group(const Block<kRows>* blocks, int64_t input_blocks, const float* x,
                    int64_t tokens, float* dense, float (*sums)[kRows]) {
  for (int64_t b = 0; b < input_blocks; b += kChunkBlocks) {
    const int64_t count = kChunkBlocks < input_blocks - b ? kChunkBlocks : input_blocks - b;
    expand(blocks + b, count, dense);
    for (int64_t t = 0; t < tokens; ++t) {
      multiply(dense, x + (t * input_blocks + b) * kBlockInputs, count * kBlockInputs, sums[t]);
    }
  }
}

}  // namespace

void portable(const LinearArguments& a) {
  const int64_t input_blocks = ceil_div(a.k, kBlockInputs);
  const int64_t inputs = input_blocks * kBlockInputs;
  auto* x = static_cast<float*>(
      thread_scratch(Scratch::kActivations, std::min(a.m, kTokenGroup) * inputs * sizeof(float)));
  for (int64_t first = 0; first < a.m; first += kTokenGroup) {
    const int64_t tokens = std::min(kTokenGroup, a.m - first);
    for (int64_t t = 0; t < tokens; ++t) {
      const bf16* source = a.x + (first + t) * a.x_stride;
      for (int64_t i = 0; i < a.k; ++i) x[t * inputs + i] = to_float(source[i]);
      std::fill(x + t * inputs + a.k, x + (t + 1) * inputs, 0.0f);
    }
    parallel_for(ceil_div(a.n, kRows), [&](int64_t begin, int64_t end) {
      auto* dense = static_cast<float*>(
          thread_scratch(Scratch::kPanel, kRows * kChunkBlocks * kBlockInputs * sizeof(float)));
      for (int64_t group = begin; group < end; ++group) {
        const auto* blocks = static_cast<const Block<kRows>*>(a.packed) + group * input_blocks;
        const int64_t rows = std::min<int64_t>(kRows, a.n - group * kRows);
        float sums[kTokenGroup][kRows] = {};
        multiply_group(blocks, input_blocks, x, tokens, dense, sums);
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t row = group * kRows + r;
            const float bias = a.bias != nullptr ? to_float(a.bias[row]) : 0.0f;
            a.y[(first + t) * a.n + row] = to_bf16(sums[t][r] + bias);
          }
        }
      }
    });
  }
}

}  // namespace permllm::cpu
