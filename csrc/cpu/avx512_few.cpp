// AVX-512 with BF16 for 1..12 tokens: every row is expanded in registers and multiplied at once.
//
// A vector holds 32 inputs of one row; one accumulator per row and token keeps 16 partial sums,
// which are added up once per output. What is read from memory is the packed weight alone, in
// order.
#include "kernels.h"
#include "scratch.h"
#include "threads.h"
// The vector code comes last.
#include "avx512.h"

namespace permllm::cpu {
namespace {

// Rows whose sums fit the registers beside their weights: the others take further passes, from L2.
constexpr int rows_per_pass(int tokens) { return tokens <= 3 ? 8 : tokens <= 6 ? 4 : 2; }

// x as [input block][half][token][32], zeros past k.
void pack_activations(const LinearArguments& a, bf16* packed) {
  const int64_t blocks = ceil_div(a.k, kBlockInputs);
  for (int64_t half = 0; half < 2 * blocks; ++half) {
    const int64_t first = half * 32;
    const int64_t inputs = a.k - first < 32 ? a.k - first : 32;
    const auto mask =
        inputs <= 0 ? __mmask32{0} : static_cast<__mmask32>(0xffffffff >> (32 - inputs));
    for (int64_t t = 0; t < a.m; ++t) {
      const __m512i x = _mm512_maskz_loadu_epi16(mask, a.x + t * a.x_stride + first);
      _mm512_store_si512(packed + (half * a.m + t) * 32, x);
    }
  }
}

// The sums of the lanes of four vectors.
inline __m128 add_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 four = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
  return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
}

// The sums of one row group, 16 partial ones per row and token.
template <int Tokens>
using Sums = __m512[kRows][Tokens];

// Adds the products of rows first..first+Rows-1 of some blocks, while the pass's share of the
// blocks kAhead further on is fetched, evenly.
template <int Tokens, int Rows>
inline void multiply(const Rows8* block, int64_t blocks, int first, const bf16* x,
                     Sums<Tokens>& sums) {
  constexpr int kStep = sizeof(Rows8) * Rows / kRows;  // bytes to fetch per block of one pass
  constexpr int kAhead = Rows == kRows ? tuning::kFewAhead : tuning::kFewAheadPasses;
  const char* ahead =
      reinterpret_cast<const char*>(block + kAhead) + blocks * kStep * (first / Rows);
  __m512 sum[Rows][Tokens];
  PERMLLM_UNROLL
  for (int r = 0; r < Rows; ++r) {
    PERMLLM_UNROLL
    for (int t = 0; t < Tokens; ++t) sum[r][t] = sums[first + r][t];
  }
  for (const Rows8* end = block + blocks; block != end; ++block, x += Tokens * kBlockInputs) {
    if (Tokens >= tuning::kFewFetchTokens) prefetch<tuning::kFewHint, kStep>(ahead);
    ahead += kStep;
    PERMLLM_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const __m512i low = expand_low(*block, first + r);
      const __m512i high = expand_high(*block, first + r);
      PERMLLM_UNROLL
      for (int t = 0; t < Tokens; ++t) {
        sum[r][t] = dot_pairs(sum[r][t], low, _mm512_load_si512(x + t * 32));
      }
      PERMLLM_UNROLL
      for (int t = 0; t < Tokens; ++t) {
        sum[r][t] = dot_pairs(sum[r][t], high, _mm512_load_si512(x + (Tokens + t) * 32));
      }
    }
  }
  PERMLLM_UNROLL
  for (int r = 0; r < Rows; ++r) {
    PERMLLM_UNROLL
    for (int t = 0; t < Tokens; ++t) sums[first + r][t] = sum[r][t];
  }
}

template <int Tokens>
void store(const LinearArguments& a, int64_t row, const Sums<Tokens>& sums) {
  const auto mask = static_cast<__mmask8>(a.n - row >= kRows ? 0xff : (1 << (a.n - row)) - 1);
  __m256 bias = _mm256_setzero_ps();
  if (a.bias != nullptr) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(mask, a.bias + row));
    bias = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  }
  for (int t = 0; t < Tokens; ++t) {
    const __m128 low = add_lanes(sums[0][t], sums[1][t], sums[2][t], sums[3][t]);
    const __m128 high = add_lanes(sums[4][t], sums[5][t], sums[6][t], sums[7][t]);
    const __m256 y = _mm256_add_ps(_mm256_set_m128(high, low), bias);
    _mm_mask_storeu_epi16(a.y + t * a.n + row, mask,
                          reinterpret_cast<__m128i>(_mm256_cvtneps_pbh(y)));
  }
}

template <int Tokens>
void run(const LinearArguments& a, const bf16* x, int64_t begin, int64_t end) {
  constexpr int kPass = rows_per_pass(Tokens);
  constexpr int64_t kBlockBytes = sizeof(Rows8) + Tokens * kBlockInputs * sizeof(bf16);
  const int64_t blocks = ceil_div(a.k, kBlockInputs);
  // Where there are several passes, they find what they read in L1.
  const int64_t chunk = kPass == kRows ? blocks : tuning::kFewChunkBytes / kBlockBytes;
  const auto* packed = static_cast<const Rows8*>(a.packed);
  for (int64_t group = begin; group < end; ++group) {
    Sums<Tokens> sums;
    PERMLLM_UNROLL
    for (auto& row : sums) {
      PERMLLM_UNROLL
      for (__m512& sum : row) sum = _mm512_setzero_ps();
    }
    const Rows8* block = packed + group * blocks;
    for (int64_t b = 0; b < blocks; b += chunk) {
      const int64_t count = b + chunk < blocks ? chunk : blocks - b;
      PERMLLM_UNROLL
      for (int first = 0; first < kRows; first += kPass) {
        multiply<Tokens, kPass>(block + b, count, first, x + b * Tokens * kBlockInputs, sums);
      }
    }
    store<Tokens>(a, group * kRows, sums);
  }
}

using Run = void (*)(const LinearArguments&, const bf16* x, int64_t begin, int64_t end);
constexpr Run kRunByTokens[] = {run<1>, run<2>, run<3>, run<4>,  run<5>,  run<6>,
                                run<7>, run<8>, run<9>, run<10>, run<11>, run<12>};

}  // namespace

void avx512_few_tokens(const LinearArguments& a) {
  const int64_t blocks = ceil_div(a.k, kBlockInputs);
  auto* x = static_cast<bf16*>(
      thread_scratch(Scratch::kActivations, a.m * blocks * kBlockInputs * sizeof(bf16)));
  pack_activations(a, x);
  const Run run_tokens = kRunByTokens[a.m - 1];
  parallel_for(ceil_div(a.n, kRows),
               [&](int64_t begin, int64_t end) { run_tokens(a, x, begin, end); });
}

}  // namespace permllm::cpu
