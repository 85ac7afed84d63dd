// Plain C++ for any CPU.
//
// Only kept values are multiplied, in vectors of four: with few tokens one meets all of them, with
// many those of vector/kept.h.
#include <bit>

#include "cpu/vector/float32.h"
#include "cpu/vector/kept.h"

namespace permllm::cpu {
namespace {

static_assert(std::endian::native == std::endian::little, "masks were bytes");

struct Portable {
  typedef float Vector __attribute__((vector_size(16), may_alias));
  using Tuning = PortableTuning;
  static constexpr int kLanes = 4;
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

// The sums of one row. `add` takes x of a block, which of its inputs four values meet, and the
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

// One token, or up to four.
template <class Sums, class Value, class Real>
class FewTokens {
 public:
  static constexpr int64_t kPreparedAlone = PortableTuning::kPreparedAlone;

  explicit FewTokens(const LinearOf<Real>& a)
      : a_(a), blocks_(ceil_div(a.k, kBlockInputs)), x_(static_cast<float*>(a.packed_x)) {}

  int64_t elements() const { return a_.m * a_.k; }
  static int64_t measures() { return 0; }
  static void measure(int64_t) {}
  int64_t packs() const { return blocks_; }
  int64_t groups() const { return ceil_div(a_.n, kRows); }

  // x as [input][token], zeros where there is none.
  void pack(int64_t block) const {
    const int64_t first = block * kBlockInputs;
    const int64_t inputs = smaller(kBlockInputs, a_.k - first);
    float* target = x_ + first * Sums::kTokens;
    __builtin_memset(target, 0, kBlockInputs * Sums::kTokens * sizeof(float));
    for (int64_t t = 0; t < a_.m; ++t) {
      const Real* source = a_.x + t * a_.x_stride + first;
      for (int64_t i = 0; i < inputs; ++i) target[i * Sums::kTokens + t] = to_float(source[i]);
    }
  }

  void run(int64_t begin, int64_t end) const {
    for (int64_t group = begin; group < end; ++group) multiply_group(group);
  }

 private:
  void multiply_group(int64_t group) const {
    const auto* block = static_cast<const Block<kRows, Value>*>(a_.packed) + group * blocks_;
    const float* x = x_;
    Sums rows[kRows];
    for (int64_t b = 0; b < blocks_; ++b, ++block, x += kBlockInputs * Sums::kTokens) {
      for (int r = 0; r < kRows; ++r) {
        RowPlaces<uint8_t> places;
        find_places<uint8_t, 1>(block->mask[r], places);
        Sums row = rows[r];
        PERMLLM_UNROLL
        for (int i = 0; i < kBlockValues; i += 4) {
          row.add(x, places + i, widen(block->values[r] + i));
        }
        rows[r] = row;
      }
    }
    const Float32Outputs<Real> out(a_, group, 1.0f);
    for (int r = 0; r < out.rows; ++r) {
      for (int64_t t = 0; t < a_.m; ++t) {
        const float total = rows[r].total(t);
        round_to(out.at(t, r), out.value(t, r, &total));
      }
    }
  }

  const LinearOf<Real>& a_;
  const int64_t blocks_;
  float* const x_;
};

static_assert(PortableTuning::kFewTokens <= FourTokens::kTokens);

template <class Value, class Real>
void linear(const LinearOf<Real>& a, Worker& worker) {
  if (a.m == 1) {
    go_through(FewTokens<OneToken, Value, Real>(a), a.last, worker);
  } else if (a.m <= PortableTuning::kFewTokens) {
    go_through(FewTokens<FourTokens, Value, Real>(a), a.last, worker);
  } else {
    go_through_parts<KeptTokens<KeptMasks<Portable, Value>, Real>>(a, worker);
  }
}

template <class Real>
void either(const LinearOf<Real>& a, Worker& worker) {
  a.scale != nullptr ? linear<int8_t>(a, worker) : linear<bf16>(a, worker);
}

}  // namespace

void portable(const LinearOf<bf16>& a, Worker& worker) { either(a, worker); }
void portable(const LinearOf<fp16>& a, Worker& worker) { either(a, worker); }
void portable(const LinearOf<float>& a, Worker& worker) { either(a, worker); }

}  // namespace permllm::cpu
