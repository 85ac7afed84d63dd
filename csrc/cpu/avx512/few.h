// AVX-512 for the fewest tokens (tuning.h says how many): every row is expanded in registers and
// multiplied at once.
//
// A vector holds inputs of one row; accumulators per row and token keep 16 partial sums, which are
// added up once per output. What is read from memory is the packed weight alone, in order.
//
// `Products` says what the values are and how they meet x:
//   Tuning                         the table of constants
//   Value                          of the blocks
//   Rows                           how a row group is expanded (avx512/expand.h)
//   kWeights, kInputs, kSums       vectors that hold 64 inputs of a row, and of a token; sums
//   multiply(sums, weights, input, x)  adds the products with vector `input` of a token
//   multiply_one(sum, weights, x)  the same of one vector, for strays
//   add(a, b)                      of sums
//   rows_per_pass(tokens)          whose sums fit the registers beside their weights
//   kOneTokenFetch                 bytes of a block that are fetched ahead with one token, at most
//   kFewRows                       that are expanded before a vector of x meets them all
//   Inputs                         constructed from the arguments; measures(),
//                                  measure(token) for as many before any
//                                  load(token, block, vectors), which gives a token's 64 inputs
//                                  in the order of the block,
//                                  zeros past k
//   Outputs                        constructed from the arguments and the Inputs;
//                                  convert(sums of 8 rows, row, mask of those that exist, token) as
//                                  floats
#pragma once

#include "cpu/kernels.h"
#include "cpu/threads/phases.h"
// The vector code comes last.
#include "cpu/avx512/expand.h"
#include "cpu/words.h"

namespace permllm::cpu {
namespace {

// Where the sums of one row group go, those of the rows of x in order. `Plain`: with plain stores
// wherever all rows exist. The reads that the hardware fetches ahead stop at a masked store; those
// that the kernel fetches do not.
template <class Products, bool Plain = false>
class RowOutputs {
 public:
  RowOutputs(const LinearArguments& a, const typename Products::Outputs& outputs, int64_t row)
      : arguments_(a),
        outputs_(outputs),
        row_(row),
        mask_(static_cast<__mmask8>(a.n - row >= kRows ? 0xff : (1 << (a.n - row)) - 1)),
        bias_(_mm256_setzero_ps()),
        first_part_(_mm256_setzero_ps()) {
    if (a.bias == nullptr) return;
    const __m128i bias = _mm_maskz_loadu_epi16(mask_, a.bias + row);
    bias_ = _mm512_castps512_ps256(widen(_mm256_castsi128_si256(bias), a.half));
  }

  void store(const __m256i (&sums)[Products::kSums], int64_t row_of_x) {
    __m256 y = outputs_.convert(sums, row_, mask_, row_of_x);
    if (arguments_.parts == 2) {
      if (row_of_x % 2 == 0) {
        first_part_ = y;
        return;
      }
      y = _mm256_add_ps(first_part_, y);
    }
    const __m512 rounded = _mm512_castps256_ps512(_mm256_add_ps(y, bias_));
    const __m128i words = _mm256_castsi256_si128(round_words(rounded, arguments_.half));
    bf16* target = arguments_.y + arguments_.token(row_of_x) * arguments_.n + row_;
    if (Plain && mask_ == 0xff) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target), words);
    } else {
      _mm_mask_storeu_epi16(target, mask_, words);
    }
  }

 private:
  const LinearArguments& arguments_;
  const typename Products::Outputs& outputs_;
  int64_t row_;
  __mmask8 mask_;
  __m256 bias_;
  __m256 first_part_;
};

template <class Products, int Tokens>
class FewTokens {
  using Tuning = typename Products::Tuning;
  using BlockOf8 = Block<kRows, typename Products::Value>;
  using Rows = typename Products::Rows;
  using Inputs = typename Products::Inputs;
  using Outputs = typename Products::Outputs;

  static constexpr int kWeights = Products::kWeights;
  static constexpr int kInputs = Products::kInputs;
  static constexpr int kSums = Products::kSums;
  static constexpr int kPass = Products::rows_per_pass(Tokens);  // further rows: from the cache
  static constexpr int kStepVectors = kInputs * Tokens;          // of x per block
  static constexpr int kTogether = kPass < Products::kFewRows ? kPass : Products::kFewRows;

  // The sums of one row group, 16 partial ones each.
  struct Sums {
    __m512i of[kRows][Tokens][kSums];
  };

 public:
  static constexpr int64_t kPreparedAlone = Tuning::kPreparedAlone;

  explicit FewTokens(const LinearArguments& a)
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
    const int64_t end =
        blocks_ - first < Tuning::kPackBlocks ? blocks_ : first + Tuning::kPackBlocks;
    for (int64_t b = first; b < end; ++b) {
      for (int t = 0; t < Tokens; ++t) {
        __m512i vectors[kInputs];
        inputs_.load(t, b, vectors);
        for (int i = 0; i < kInputs; ++i) x_[(b * kInputs + i) * Tokens + t] = vectors[i];
      }
    }
  }

  void run(int64_t begin, int64_t end) const {
    constexpr int64_t kStepBytes = sizeof(BlockOf8) + kStepVectors * sizeof(__m512i);
    // Where there are several passes, they find what they read in L1.
    constexpr int64_t kChunkBytes =
        kPass == kRows / 4 ? Tuning::kFewShortChunkBytes : Tuning::kFewChunkBytes;
    const int64_t chunk = kPass == kRows ? blocks_ : kChunkBytes / kStepBytes;
    const auto* packed = static_cast<const BlockOf8*>(arguments_.packed);
    for (int64_t group = begin; group < end; ++group) {
      Sums sums;
      PERMLLM_UNROLL
      for (auto& row : sums.of) {
        PERMLLM_UNROLL
        for (auto& token : row) {
          PERMLLM_UNROLL
          for (__m512i& sum : token) sum = _mm512_setzero_si512();
        }
      }
      const Rows rows(arguments_, group);
      rows.for_each_stray(arguments_.k, [&](int row, int64_t input, auto value) {
        const __m512i weights = only_word(input % 32, value);
        const __m512i* x = x_ + input / 32 * Tokens;
        for (int t = 0; t < Tokens; ++t) {
          __m512i& sum = sums.of[row][t][0];
          sum = Products::multiply_one(sum, weights, x[t]);
        }
      });
      const BlockOf8* block = packed + group * blocks_;
      for (int64_t b = 0; b < blocks_; b += chunk) {
        const int64_t count = b + chunk < blocks_ ? chunk : blocks_ - b;
        PERMLLM_UNROLL
        for (int first = 0; first < kRows; first += kPass) {
          multiply(rows, block + b, count, first, x_ + b * kStepVectors, sums);
        }
      }
      store(group * kRows, sums);
    }
  }

 private:
  // Adds the products of rows first..first+kPass-1 of some blocks, while the pass's share of blocks
  // further on is fetched, evenly.
  static void multiply(const Rows& rows, const BlockOf8* block, int64_t blocks, int first,
                       const __m512i* x, Sums& sums) {
    constexpr int kShare = sizeof(BlockOf8) * kPass / kRows;  // bytes to fetch per block
    constexpr int kBlockBytes = sizeof(BlockOf8);
    constexpr int kFetched = Tokens > 1                               ? kShare
                             : Products::kOneTokenFetch < kBlockBytes ? Products::kOneTokenFetch
                                                                      : kBlockBytes;
    constexpr int kAhead = Tokens == 1      ? Tuning::kOneTokenAhead
                           : kPass == kRows ? Tuning::kFewAhead
                                            : Tuning::kFewAheadPasses;
    const char* ahead =
        reinterpret_cast<const char*>(block) + kAhead + blocks * kShare * (first / kPass);
    __m512i sum[kPass][Tokens][kSums];
    PERMLLM_UNROLL
    for (int r = 0; r < kPass; ++r) {
      PERMLLM_UNROLL
      for (int t = 0; t < Tokens; ++t) {
        PERMLLM_UNROLL
        for (int s = 0; s < kSums; ++s) sum[r][t][s] = sums.of[first + r][t][s];
      }
    }
    for (const BlockOf8* end = block + blocks; block != end; ++block, x += kStepVectors) {
      prefetch<Tuning::kFewHint, kFetched>(ahead);
      ahead += kShare;
      PERMLLM_UNROLL
      for (int r = 0; r < kPass; r += kTogether) {
        __m512i weights[kTogether][kWeights];
        PERMLLM_UNROLL
        for (int j = 0; j < kTogether; ++j) rows.expand(*block, first + r + j, weights[j]);
        PERMLLM_UNROLL
        for (int i = 0; i < kInputs; ++i) {
          PERMLLM_UNROLL
          for (int t = 0; t < Tokens; ++t) {
            const __m512i inputs = x[i * Tokens + t];
            PERMLLM_UNROLL
            for (int j = 0; j < kTogether; ++j) {
              Products::multiply(sum[r + j][t], weights[j], i, inputs);
            }
          }
        }
      }
    }
    PERMLLM_UNROLL
    for (int r = 0; r < kPass; ++r) {
      PERMLLM_UNROLL
      for (int t = 0; t < Tokens; ++t) {
        PERMLLM_UNROLL
        for (int s = 0; s < kSums; ++s) sums.of[first + r][t][s] = sum[r][t][s];
      }
    }
  }

  // The sums of the lanes of eight vectors, those of a row group.
  static __m256i add_lanes(const Sums& sums, int token, int s) {
    __m512i pairs[4], fours[2];
    PERMLLM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const __m512i a = sums.of[2 * i][token][s], b = sums.of[2 * i + 1][token][s];
      pairs[i] = Products::add(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    }
    PERMLLM_UNROLL
    for (int i = 0; i < 2; ++i) {
      const __m512i a = pairs[2 * i], b = pairs[2 * i + 1];
      fours[i] = Products::add(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    }
    // Four 128-bit quarters of partial sums each, of rows 0..3 and of rows 4..7.
    const __m512i halves = Products::add(_mm512_shuffle_i64x2(fours[0], fours[1], 0x88),
                                         _mm512_shuffle_i64x2(fours[0], fours[1], 0xdd));
    const __m512i swapped = _mm512_shuffle_i64x2(halves, halves, 0xb1);
    const __m512i all = Products::add(halves, swapped);
    return _mm512_castsi512_si256(_mm512_shuffle_i64x2(all, all, 0x08));
  }

  void store(int64_t row, const Sums& sums) const {
    RowOutputs<Products, Tokens == 1> rows(arguments_, outputs_, row);
    for (int t = 0; t < Tokens; ++t) {
      __m256i totals[kSums];
      PERMLLM_UNROLL
      for (int s = 0; s < kSums; ++s) totals[s] = add_lanes(sums, t, s);
      rows.store(totals, t);
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
void multiply_few_tokens(const LinearArguments& a, Worker& worker) {
  if constexpr (Most > Least) {
    if (a.m < Most) return multiply_few_tokens<Products, Most - 1, Least>(a, worker);
  }
  go_through(FewTokens<Products, Most>(a), a.last, worker);
}

}  // namespace
}  // namespace permllm::cpu
