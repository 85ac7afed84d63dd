// AVX-512 for dense rows, which are read in place and in order: up to kDenseTokens tokens of
// bfloat16, any number of float16, kDenseTokens at a time.
//
// A vector holds 32 inputs of one row; accumulators per row and token keep 16 partial sums. Sums of
// kGroup rows wait for each other and are rounded together. bfloat16 rows are multiplied as they
// are, float16 in float32.
#include "cpu/dense.h"

#include "cpu/threads/phases.h"
// The vector code comes last.
#include "cpu/avx512/avx512.h"
#include "cpu/words.h"

namespace permllm::cpu {
namespace {

// How 32 inputs of a row meet those of a token, kParts vectors of both.
template <class Tuning>
struct Bfloat16Rows {
  static constexpr int kParts = 1;
  static constexpr int kGroup = kLanes * Tuning::kDenseRows;  // rows that are rounded together

  // At a time.
  static constexpr int rows(int tokens) {
    return tokens == 1   ? 1
           : tokens == 6 ? Tuning::kDenseRowsOf6
           : tokens == 8 ? Tuning::kDenseRowsOf8
                         : Tuning::kDenseRows;
  }

  static void split(__m512i words, __m512i (&parts)[1]) { parts[0] = words; }

  static __m512 multiply(__m512 sum, const __m512i (&weights)[1], const __m512i* x) {
    return dot_pairs(sum, weights[0], x[0]);
  }
};

template <class Tuning>
struct Float16Rows {
  static constexpr int kParts = 2;
  static constexpr int kGroup = 3 * kLanes;

  static constexpr int rows(int tokens) {
    return tokens == 1 ? 1 : tokens == 8 ? Tuning::kDenseFloat16RowsOf8 : Tuning::kDenseFloat16Rows;
  }

  static void split(__m512i words, __m512i (&parts)[2]) {
    parts[0] = _mm512_castps_si512(widen(low_words(words), true));
    parts[1] = _mm512_castps_si512(widen(high_words(words), true));
  }

  static __m512 multiply(__m512 sum, const __m512i (&weights)[2], const __m512i* x) {
    PERMLLM_UNROLL
    for (int p = 0; p < 2; ++p) {
      sum = _mm512_fmadd_ps(_mm512_castsi512_ps(weights[p]), _mm512_castsi512_ps(x[p]), sum);
    }
    return sum;
  }
};

// `Tokens` are those of the call, or more, which are zeros.
template <class Tuning, class Rows, int Tokens>
class DenseTokens {
  static constexpr int kParts = Rows::kParts;
  static constexpr int kPass = Rows::rows(Tokens);
  static constexpr int kGroup = Rows::kGroup;

 public:
  static constexpr int64_t kPreparedAlone = Tuning::kPreparedAlone;

  explicit DenseTokens(const LinearArguments& a)
      : arguments_(a), vectors_(a.k / kDenseInputs), x_(static_cast<__m512i*>(a.packed_x)) {}

  int64_t elements() const { return Tokens * arguments_.k; }
  static int64_t measures() { return 0; }
  static void measure(int64_t) {}
  int64_t packs() const { return ceil_div(vectors_, Tuning::kPackVectors); }
  int64_t groups() const { return ceil_div(arguments_.n, kGroup); }

  // Packed x is [vector][token][part].
  void pack(int64_t item) const {
    const int64_t first = item * Tuning::kPackVectors;
    for (int64_t v = first; v < vectors_ && v < first + Tuning::kPackVectors; ++v) {
      for (int64_t t = 0; t < Tokens; ++t) {
        __m512i parts[kParts];
        Rows::split(t < arguments_.m ? _mm512_loadu_si512(arguments_.x + t * arguments_.x_stride +
                                                          v * kDenseInputs)
                                     : _mm512_setzero_si512(),
                    parts);
        for (int p = 0; p < kParts; ++p) x_[(v * Tokens + t) * kParts + p] = parts[p];
      }
    }
  }

  void run(int64_t begin, int64_t end) const {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kGroup;
      const int64_t left = arguments_.n - first;
      const int rows = static_cast<int>(left < kGroup ? left : kGroup);
      float y[Tokens][kGroup];
      int row = 0;
      for (; row + kPass <= rows; row += kPass) multiply<kPass>(first, row, y);
      for (; row < rows; ++row) multiply<1>(first, row, y);
      store(first, rows, y);
    }
  }

 private:
  template <int Pass>
  void multiply(int64_t first, int row, float (&y)[Tokens][kGroup]) const {
    const auto* weights =
        static_cast<const bf16*>(arguments_.packed) + (first + row) * arguments_.k;
    const char* ahead = reinterpret_cast<const char*>(weights) + Tuning::kDenseAhead;
    __m512 sums[Pass][Tokens];
    PERMLLM_UNROLL
    for (auto& of_row : sums) {
      PERMLLM_UNROLL
      for (__m512& sum : of_row) sum = _mm512_setzero_ps();
    }
    const __m512i* x = x_;
    for (int64_t v = 0; v < vectors_; ++v, x += Tokens * kParts, weights += kDenseInputs) {
      if (Pass >= Tuning::kDensePrefetchedRows) {
        prefetch<Tuning::kDenseHint, 64 * Pass>(ahead + v * 64 * Pass);
      }
      PERMLLM_UNROLL
      for (int r = 0; r < Pass; ++r) {
        __m512i w[kParts];
        Rows::split(_mm512_load_si512(weights + r * arguments_.k), w);
        PERMLLM_UNROLL
        for (int t = 0; t < Tokens; ++t) {
          sums[r][t] = Rows::multiply(sums[r][t], w, x + t * kParts);
        }
      }
    }
    PERMLLM_UNROLL
    for (int r = 0; r < Pass; ++r) {
      PERMLLM_UNROLL
      for (int t = 0; t < Tokens; ++t) y[t][row + r] = _mm512_reduce_add_ps(sums[r][t]);
    }
  }

  void store(int64_t first, int rows, const float (&y)[Tokens][kGroup]) const {
    for (int64_t t = 0; t < arguments_.m; ++t) {
      for (int row = 0; row < rows; row += kLanes) {
        const auto mask = static_cast<__mmask16>(first_lanes(rows - row));
        const __m512 sums = _mm512_maskz_loadu_ps(mask, &y[t][row]);
        _mm256_mask_storeu_epi16(arguments_.y + t * arguments_.n + first + row, mask,
                                 low_words(round_words(sums, sums, arguments_.half)));
      }
    }
  }

  LinearArguments arguments_;
  int64_t vectors_;
  __m512i* x_;
};

template <class Tuning, class Rows, int Tokens>
void multiply_dense(const LinearArguments& a, Worker& worker) {
  go_through(DenseTokens<Tuning, Rows, Tokens>(a), a.last, worker);
}

// At most kDenseTokens.
template <class Tuning, class Rows>
void multiply_tokens(const LinearArguments& a, Worker& worker) {
  if (a.m == 1) return multiply_dense<Tuning, Rows, 1>(a, worker);
  if (a.m == 2) return multiply_dense<Tuning, Rows, 2>(a, worker);
  if (a.m <= 4) return multiply_dense<Tuning, Rows, 4>(a, worker);
  const int64_t token_bytes = a.k * Rows::kParts * sizeof(bf16);
  if (a.m <= 6 && 6 * token_bytes <= Tuning::kDenseCacheBytes) {
    return multiply_dense<Tuning, Rows, 6>(a, worker);
  }
  multiply_dense<Tuning, Rows, Tuning::kDenseTokens>(a, worker);
}

}  // namespace

template <class Tuning>
void avx512_dense(const LinearArguments& a, Worker& worker) {
  if (!a.half) return multiply_tokens<Tuning, Bfloat16Rows<Tuning>>(a, worker);
  for (int64_t first = 0; first < a.m; first += Tuning::kDenseTokens) {
    const int64_t left = a.m - first;
    const int64_t count = left < Tuning::kDenseTokens ? left : Tuning::kDenseTokens;
    multiply_tokens<Tuning, Float16Rows<Tuning>>(part_of(a, first, count), worker);
  }
}

template void avx512_dense<Avx512Bf16Tuning>(const LinearArguments&, Worker&);
template void avx512_dense<Zen5Tuning>(const LinearArguments&, Worker&);

}  // namespace permllm::cpu
