// From blocks to the kept values of two rows and their places, in AVX-512 registers.
//
// Expanding brings values to all inputs, and half of the products are with zeros. Here inputs are
// brought to the values, by one shuffle for two rows: a shuffle and a product in place of two
// products. Where a core shuffles beside the products (tuning.h says so), that takes two thirds of
// the time.
//
// KeptRows<Value>, constructed from the arguments and a row group of theirs, has
//   take(block, row, weights)    of rows `row` and `row + 1`, each in a half of the vectors, for
//                                every vector of inputs of a block: the places of its kept values,
//                                and the values
//   for_each_stray(inputs, body) as ExpandedRows
//
// Include after every other header, in files that are compiled for AVX-512 only.
#pragma once

#include "avx512.h"
#include "avx512_expand.h"
#include "kernels.h"

namespace permllm::cpu {
namespace {

inline __m512i byte_numbers() {
  struct Numbers {
    uint8_t of[sizeof(__m512i)];
  };
  alignas(64) static constexpr Numbers kNumbers = [] {
    Numbers numbers = {};
    for (size_t i = 0; i < sizeof(numbers); ++i) numbers.of[i] = static_cast<uint8_t>(i);
    return numbers;
  }();
  return _mm512_load_si512(kNumbers.of);
}

// The bytes that a mask keeps, of which there are 32. Into a register that is freshly zero, as
// expansions go.
inline __m256i compress_bytes(__mmask64 mask, __m512i bytes) {
  return _mm512_castsi512_si256(_mm512_mask_compress_epi8(fresh_zero(), mask, bytes));
}

inline __m512i join(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

template <class Value>
class KeptRows;

template <>
class KeptRows<int8_t> {
 public:
  KeptRows(const LinearArguments&, int64_t) {}

  static void take(const Block<kRows, int8_t>& block, int row, __m512i (&weights)[1][2]) {
    const __m512i numbers = byte_numbers();
    weights[0][0] = join(compress_bytes(block.mask[row], numbers),
                         compress_bytes(block.mask[row + 1], numbers));
    weights[0][1] = _mm512_load_si512(block.values[row]);
  }

  template <class Body>
  static void for_each_stray(int64_t, Body) {}
};

}  // namespace
}  // namespace permllm::cpu
