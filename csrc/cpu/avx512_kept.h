// From blocks to the kept values of two rows and their places, in AVX-512 registers.
//
// Expanding brings values to all inputs, and half of the products are with zeros. Here inputs are
// brought to the values, by one shuffle for two rows: a shuffle and a product in place of two
// products. Where a core shuffles beside the products (tuning.h says so), that takes two thirds of
// the time.
//
// KeptRows<Value>, constructed from the arguments and a row group of theirs, has
//   take(block, row, weights)    of rows `row`, an even one, and `row + 1`, each in a half of the
//                                vectors, for every vector of inputs of a block: the places of its
//                                kept values, and the values
//   for_each_stray(inputs, body) as ExpandedRows
//
// Include after every other header, in files that are compiled for AVX-512 only.
#pragma once

#include "avx512.h"
#include "avx512_expand.h"
#include "kernels.h"

namespace permllm::cpu {
namespace {

struct Bytes {
  uint8_t of[sizeof(__m512i)];
};

template <class Body>
constexpr Bytes bytes_of(Body body) {
  Bytes bytes = {};
  for (int i = 0; i < 64; ++i) bytes.of[i] = static_cast<uint8_t>(body(i));
  return bytes;
}

// The bytes that a mask keeps, of which there are 32. Into a register that is freshly zero, as
// expansions go.
inline __m256i compress_bytes(__mmask64 mask, __m512i bytes) {
  return _mm512_castsi512_si256(_mm512_mask_compress_epi8(fresh_zero(), mask, bytes));
}

template <class Value>
class KeptRows;

template <>
class KeptRows<int8_t> {
 public:
  KeptRows(const LinearArguments&, int64_t) {}

  static void take(const Block<kRows, int8_t>& block, int row, __m512i (&weights)[1][2]) {
    const __m512i numbers = _mm512_load_si512(kInputs.of);
    weights[0][0] = join(compress_bytes(block.mask[row], numbers),
                         compress_bytes(block.mask[row + 1], numbers));
    weights[0][1] = _mm512_load_si512(block.values[row]);
  }

  template <class Body>
  static void for_each_stray(int64_t, Body) {}

 private:
  alignas(64) static constexpr Bytes kInputs = bytes_of([](int input) { return input; });
};

// Of the four values that a row keeps of every eight inputs, in the order of a block's mask, those
// of its first and of its second 32 inputs take turns (layout.h).
template <>
class KeptRows<bf12> : public UpperTables {
 public:
  KeptRows(const LinearArguments& a, int64_t group) : UpperTables(a, group) {
    PERMLLM_UNROLL
    for (int p = 0; p < kRows / 2; ++p) {
      pairs_[p] =
          join(_mm512_castsi512_si256(tables_[2 * p]), _mm512_castsi512_si256(tables_[2 * p + 1]));
    }
  }

  void take(const Block<kRows, bf12>& block, int row, __m512i (&weights)[2][2]) const {
    const __m512i inputs = _mm512_load_si512(kInputs.of);
    const __m512i places =
        join(compress_bytes(block.mask[row], inputs), compress_bytes(block.mask[row + 1], inputs));
    split(places, places, weights[0][0], weights[1][0]);
    __m512i index = _mm512_load_si512(block.upper[row % (kRows / 2)]);
    if (row >= kRows / 2) index = _mm512_srli_epi16(index, 4);
    const __m512i upper =
        _mm512_shuffle_epi8(pairs_[row / 2], _mm512_and_si512(index, _mm512_set1_epi8(15)));
    split(_mm512_load_si512(block.lower[row]), upper, weights[0][1], weights[1][1]);
  }

 private:
  // Of a half of the block, by place in the mask.
  alignas(64) static constexpr Bytes kInputs = bytes_of([](int place) {
    return place / 16 * 8 + place % 8;
  });

  // Words of two bytes each, of the first four of eight and of the others.
  static void split(__m512i lower, __m512i upper, __m512i& first, __m512i& second) {
    const __m512i low = _mm512_unpacklo_epi8(lower, upper);
    const __m512i high = _mm512_unpackhi_epi8(lower, upper);
    first = _mm512_unpacklo_epi64(low, high);
    second = _mm512_unpackhi_epi64(low, high);
  }

  __m512i pairs_[kRows / 2];
};

}  // namespace
}  // namespace permllm::cpu
