// bfloat16 values where a vector holds inputs of one token: vdpbf16ps on a pair of them in each
// lane.
//
// Include after every other header, in files that are compiled for AVX-512 only.
#pragma once

#include <type_traits>

// The vector code comes last.
#include "cpu/avx512/expand.h"
#include "cpu/words.h"

namespace permllm::cpu {
namespace {

// As avx512/few.h and avx512/several.h ask for them.
template <class CoreTuning, class ValueType>
struct Bfloat16Products {
  using Tuning = CoreTuning;
  using Value = ValueType;
  using Rows = ExpandedRows<Tuning, Value>;
  static constexpr int kWeights = 2, kInputs = 2, kSums = 1;
  static constexpr bool kDense = std::is_same_v<Value, dense12>;
  static constexpr int kOneTokenFetch = Tuning::kOneTokenFetch;
  static constexpr int kFewRows = Tuning::kFewRows;
  static constexpr int kSeveralAhead = kDense ? Tuning::kSeveralAheadDense : Tuning::kSeveralAhead;

  static constexpr int rows_per_pass(int tokens) {
    return kRows * tokens <= Tuning::kSums       ? kRows
           : kRows / 2 * tokens <= Tuning::kSums ? kRows / 2
                                                 : kRows / 4;
  }

  static constexpr int64_t several_chunk_bytes(int vectors) {
    if (kDense) return Tuning::kSeveralChunkBytes;
    return vectors == 4 ? Tuning::kSeveralChunkBytesPast12 : Tuning::kSeveralChunkBytesUpTo12;
  }

  static constexpr int several_hint(int vectors) {
    return vectors == 4 && !kDense ? Tuning::kSeveralHintPast12 : Tuning::kSeveralHint;
  }

  static void multiply(__m512i (&sums)[1], const __m512i (&weights)[2], int half, __m512i x) {
    sums[0] = multiply_one(sums[0], weights[half], x);
  }

  static __m512i multiply_one(__m512i sum, __m512i weights, __m512i x) {
    return _mm512_castps_si512(dot_pairs(_mm512_castsi512_ps(sum), weights, x));
  }

  static __m512i add(__m512i a, __m512i b) {
    return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
  }

  struct Inputs {
    explicit Inputs(const LinearArguments& arguments) : a(arguments) {}

    static int64_t measures() { return 0; }
    static void measure(int64_t) {}

    void load(int64_t token, int64_t block, __m512i (&vectors)[2]) const {
      for (int half = 0; half < 2; ++half) {
        vectors[half] = load_half(a, token, block * kBlockInputs + half * 32);
      }
    }

    const LinearArguments& a;
  };

  struct Outputs {
    Outputs(const LinearArguments&, const Inputs&) {}

    static __m256 convert(const __m256i (&sums)[1], int64_t, __mmask8, int64_t) {
      return _mm256_castsi256_ps(sums[0]);
    }

    static __m512 convert16(const __m512i (&sums)[1], int64_t, __mmask16, int64_t, __m512 addend) {
      return _mm512_add_ps(_mm512_castsi512_ps(sums[0]), addend);
    }
  };
};

}  // namespace
}  // namespace permllm::cpu
