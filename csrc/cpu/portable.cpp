// Plain C++ for any CPU: rows are expanded to float32 a chunk of inputs at a time, then multiplied
// with every token in loops that compilers vectorise.
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "scratch.h"
#include "threads.h"

namespace permllm::cpu {
namespace {

constexpr int kRows = kPortableRows;
constexpr int kLanes = 16;           // partial sums per product, combined in a fixed order
constexpr int64_t kChunkBlocks = 8;  // 8 rows x 512 inputs of float32: half of a 32 KiB cache
constexpr int64_t kTokenGroup = 64;  // tokens whose sums are kept while the inputs are walked

float to_float(bf16 value) {
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
void expand(const Block<kRows>* blocks, int64_t count, float* dense) {
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

float dot(const float* a, const float* b, int64_t count) {
  float sums[kLanes] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
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
        for (int64_t b = 0; b < input_blocks; b += kChunkBlocks) {
          const int64_t count = std::min(kChunkBlocks, input_blocks - b);
          expand(blocks + b, count, dense);
          for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t r = 0; r < rows; ++r) {
              sums[t][r] += dot(dense + r * count * kBlockInputs, x + t * inputs + b * kBlockInputs,
                                count * kBlockInputs);
            }
          }
        }
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
