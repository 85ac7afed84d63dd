// Plain C++ for any CPU.
//
// Few tokens: the products of the pruned inputs are skipped, one kept value meets all tokens. Many:
// the float32 kernel with vectors of four.
#include <bit>

#include "float32_many.h"

namespace permllm::cpu {
namespace {

static_assert(std::endian::native == std::endian::little, "masks are read byte by byte");

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
  using Tuning = PortableTuning;
  static constexpr int kLanes = 4;

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

using Vector = Portable::Vector;

inline Vector widen(const bf16* values) {
  typedef uint16_t Narrow __attribute__((vector_size(8)));
  typedef uint32_t Wide __attribute__((vector_size(16)));
  Narrow four;
  __builtin_memcpy(&four, values, sizeof(four));
  return reinterpret_cast<Vector>(__builtin_convertvector(four, Wide) << 16);
}

#if defined(__clang__)
#define PERMLLM_SHUFFLE(Type, vector, ...) __builtin_shufflevector(vector, vector, __VA_ARGS__)
#else  // GCC has the other one from 12 on
#define PERMLLM_SHUFFLE(Type, vector, ...) __builtin_shuffle(vector, Type{__VA_ARGS__})
#endif

// A byte goes to the top of its lane, from where a shift brings it down with its sign. (Of a vector
// of four bytes compilers make scalars.)
inline Vector widen(const int8_t* values) {
  typedef int8_t Bytes __attribute__((vector_size(16)));
  typedef int16_t Pairs __attribute__((vector_size(16)));
  typedef int32_t Wide __attribute__((vector_size(16)));
  int32_t four;
  __builtin_memcpy(&four, values, sizeof(four));
  const auto bytes = reinterpret_cast<Bytes>(Wide{four});
  const auto twice = PERMLLM_SHUFFLE(Bytes, bytes, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const auto pairs = reinterpret_cast<Pairs>(twice);
  const auto lanes = reinterpret_cast<Wide>(PERMLLM_SHUFFLE(Pairs, pairs, 0, 0, 1, 1, 2, 2, 3, 3));
  return __builtin_convertvector(lanes >> 24, Vector);
}

// The sums of one row. `add` takes x of eight inputs, which four of them a row keeps, and the
// values. Four chains of additions, for each takes about four cycles.
struct OneToken {
  static constexpr int kTokens = 1;  // x is [input]

  void add(const float* x, const uint8_t* kept, Vector values) {
    sum += Vector{x[kept[0]], x[kept[1]], x[kept[2]], x[kept[3]]} * values;
  }
  float total(int64_t) const { return (sum[0] + sum[1]) + (sum[2] + sum[3]); }

  Vector sum = {};
};

struct FourTokens {
  static constexpr int kTokens = 4;  // x is [input][token]

  void add(const float* x, const uint8_t* kept, Vector values) {
    PERMLLM_UNROLL
    for (int v = 0; v < 4; ++v) sums[v] += load<Vector>(x + kTokens * kept[v]) * values[v];
  }
  float total(int64_t token) const {
    return (sums[0][token] + sums[1][token]) + (sums[2][token] + sums[3][token]);
  }

  Vector sums[4] = {};
};

template <class Sums, class Value, class Real>
void multiply_group(const LinearOf<Real>& a, const float* x, int64_t group) {
  const int64_t blocks = ceil_div(a.k, kBlockInputs);
  const auto* block = static_cast<const Block<kRows, Value>*>(a.packed) + group * blocks;
  Sums rows[kRows];
  for (int64_t b = 0; b < blocks; ++b, ++block, x += kBlockInputs * Sums::kTokens) {
    for (int r = 0; r < kRows; ++r) {
      const auto* masks = reinterpret_cast<const uint8_t*>(&block->mask[r]);
      Sums row = rows[r];
      PERMLLM_UNROLL
      for (int i = 0; i < kBlockInputs / 8; ++i) {
        row.add(x + 8 * i * Sums::kTokens, kKept.inputs[masks[i]], widen(block->values[r] + 4 * i));
      }
      rows[r] = row;
    }
  }
  const Outputs<Real> out(a, group, 1.0f);
  for (int r = 0; r < out.rows; ++r) {
    for (int64_t t = 0; t < a.m; ++t) out.write(t, r, rows[r].total(t));
  }
}

template <class Sums, class Value, class Real>
void few_tokens(const LinearOf<Real>& a) {
  const size_t bytes = ceil_div(a.k, kBlockInputs) * kBlockInputs * Sums::kTokens * sizeof(float);
  auto* x = static_cast<float*>(thread_scratch(Scratch::kActivations, bytes));
  __builtin_memset(x, 0, bytes);  // inputs past k
  for (int64_t t = 0; t < a.m; ++t) {
    for (int64_t i = 0; i < a.k; ++i) x[i * Sums::kTokens + t] = to_float(a.x[t * a.x_stride + i]);
  }
  parallel_for(ceil_div(a.n, kRows), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) multiply_group<Sums, Value>(a, x, group);
  });
}

static_assert(PortableTuning::kFewTokens <= FourTokens::kTokens);

template <class Value, class Real>
void linear(const LinearOf<Real>& a) {
  a.m == 1                            ? few_tokens<OneToken, Value>(a)
  : a.m <= PortableTuning::kFewTokens ? few_tokens<FourTokens, Value>(a)
                                      : float32_many<Portable, Value>(a);
}

template <class Real>
void either(const LinearOf<Real>& a) {
  a.scale != nullptr ? linear<int8_t>(a) : linear<bf16>(a);
}

}  // namespace

void portable(const LinearOf<bf16>& arguments) { either(arguments); }
void portable(const LinearOf<fp16>& arguments) { either(arguments); }
void portable(const LinearOf<float>& arguments) { either(arguments); }

}  // namespace permllm::cpu
