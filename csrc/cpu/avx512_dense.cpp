// AVX-512 for 1..kDenseTokens tokens and dense rows, which are read in place and in order.
//
// A vector holds 32 inputs of one row; accumulators per row and token keep 16 partial sums. Sums of
// 48 rows wait for each other and are rounded together.
#include "dense.h"
#include "phases.h"
// The vector code comes last.
#include "avx512.h"

namespace permllm::cpu {
namespace {

// `Tokens` are those of the call, or more, which are zeros.
template <class Tuning, int Tokens>
class DenseTokens {
  static constexpr int kPass = Tokens == 1   ? 1
                               : Tokens == 6 ? Tuning::kDenseRowsOf6
                               : Tokens == 8 ? Tuning::kDenseRowsOf8
                                             : Tuning::kDenseRows;
  static constexpr int kGroup = kLanes * Tuning::kDenseRows;  // rows that are rounded together

 public:
  static constexpr int64_t kPreparedAlone = Tuning::kPreparedAlone;

  explicit DenseTokens(const LinearArguments& a)
      : arguments_(a), vectors_(a.k / kDenseInputs), x_(static_cast<__m512i*>(a.packed_x)) {}

  int64_t elements() const { return Tokens * arguments_.k; }
  static int64_t measures() { return 0; }
  static void measure(int64_t) {}
  int64_t packs() const { return ceil_div(vectors_, Tuning::kPackVectors); }
  int64_t groups() const { return ceil_div(arguments_.n, kGroup); }

  // Packed x is [vector][token].
  void pack(int64_t item) const {
    const int64_t first = item * Tuning::kPackVectors;
    for (int64_t v = first; v < vectors_ && v < first + Tuning::kPackVectors; ++v) {
      for (int64_t t = 0; t < Tokens; ++t) {
        x_[v * Tokens + t] =
            t < arguments_.m
                ? _mm512_loadu_si512(arguments_.x + t * arguments_.x_stride + v * kDenseInputs)
                : _mm512_setzero_si512();
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
    for (int64_t v = 0; v < vectors_; ++v, x += Tokens, weights += kDenseInputs) {
      if (Pass >= Tuning::kDensePrefetchedRows) {
        prefetch<Tuning::kDenseHint, 64 * Pass>(ahead + v * 64 * Pass);
      }
      PERMLLM_UNROLL
      for (int r = 0; r < Pass; ++r) {
        const __m512i w = _mm512_load_si512(weights + r * arguments_.k);
        PERMLLM_UNROLL
        for (int t = 0; t < Tokens; ++t) sums[r][t] = dot_pairs(sums[r][t], w, x[t]);
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
                                 reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sums)));
      }
    }
  }

  LinearArguments arguments_;
  int64_t vectors_;
  __m512i* x_;
};

template <class Tuning, int Tokens>
void multiply_dense(const LinearArguments& a, Worker& worker) {
  go_through(DenseTokens<Tuning, Tokens>(a), a.last, worker);
}

}  // namespace

template <class Tuning>
void avx512_dense(const LinearArguments& a, Worker& worker) {
  if (a.m == 1) return multiply_dense<Tuning, 1>(a, worker);
  if (a.m == 2) return multiply_dense<Tuning, 2>(a, worker);
  if (a.m <= 4) return multiply_dense<Tuning, 4>(a, worker);
  const int64_t token_bytes = a.k * sizeof(bf16);
  if (a.m <= 6 && 6 * token_bytes <= Tuning::kDenseCacheBytes) {
    return multiply_dense<Tuning, 6>(a, worker);
  }
  multiply_dense<Tuning, Tuning::kDenseTokens>(a, worker);
}

template void avx512_dense<Avx512Bf16Tuning>(const LinearArguments&, Worker&);
template void avx512_dense<Zen5Tuning>(const LinearArguments&, Worker&);

}  // namespace permllm::cpu
