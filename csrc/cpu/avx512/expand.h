// From blocks to dense rows in AVX-512 registers, zeros where pruned.
//
// ExpandedRows<Tuning, Value>, constructed from the arguments and a row group of theirs, has
//   expand(block, row, weights)  the 64 inputs of a row of a block of the group
//   for_each_stray(inputs, body) body(row, input, value) for values that the blocks lack
//
// Zen 4 waits for the old content of a destination even where an expansion zeroes it, which makes a
// chain of 5 cycles of expansions to one register: the merging form into a register that is freshly
// zero has none.
//
// Include after every other header, in files that are compiled for AVX-512 only.
#pragma once

#include "cpu/avx512/avx512.h"
#include "cpu/avx512/multiples.h"
#include "cpu/avx512/registers.h"
#include "cpu/avx512/upper_bytes.h"
#include "cpu/kernels.h"

namespace permllm::cpu {
namespace {

inline __m512i expand_words(__mmask32 mask, const bf16* values) {
  return _mm512_mask_expand_epi16(fresh_zero(), mask, _mm512_loadu_si512(values));
}

inline __m512i expand_bytes(__mmask64 mask, __m256i values) {
  return _mm512_mask_expand_epi8(fresh_zero(), mask, _mm512_zextsi256_si512(values));
}

inline __m256i load_bytes(const void* bytes) {
  return _mm256_load_si256(static_cast<const __m256i*>(bytes));
}

// A vector of 32 words, all of them zero but one.
inline __m512i only_word(int64_t place, bf16 word) {
  return _mm512_maskz_set1_epi16(uint32_t{1} << place, static_cast<short>(word));
}

template <class Tuning, class Value>
class ExpandedRows;

// Reads up to 64 bytes past a row's values: the allocation's tail allows it.
template <class Tuning>
class ExpandedRows<Tuning, bf16> {
 public:
  ExpandedRows(const LinearArguments&, int64_t) {}

  static void expand(const Block<kRows>& block, int row, __m512i (&weights)[2]) {
    if constexpr (Tuning::kMasksFromMemory) {
      const auto* halves = reinterpret_cast<const HalfMask*>(block.mask + row);
      const __mmask32 low = load_mask(halves[0]), high = load_mask(halves[1]);
      weights[0] = expand_words(low, block.values[row]);
      weights[1] = expand_words(high, block.values[row] + __builtin_popcount(halves[0]));
    } else {
      // The compiler is kept from loading the mask in two halves, which takes longer where memory
      // is waited for, and from moving its upper half to a mask register as 64 bits, which takes
      // twice the cycles of 32.
      uint64_t mask = block.mask[row];
      __asm__("" : "+r"(mask));
      const auto low = static_cast<uint32_t>(mask);
      auto high = static_cast<uint32_t>(mask >> 32);
      __asm__("" : "+r"(high));
      weights[0] = expand_words(low, block.values[row]);
      weights[1] = expand_words(high, block.values[row] + __builtin_popcount(low));
    }
  }

  template <class Body>
  static void for_each_stray(int64_t, Body) {}
};

template <class Tuning>
class ExpandedRows<Tuning, int8_t> {
 public:
  ExpandedRows(const LinearArguments&, int64_t) {}

  static void expand(const Block<kRows, int8_t>& block, int row, __m512i (&weights)[1]) {
    weights[0] = expand_bytes(block.mask[row], load_bytes(block.values[row]));
  }

  template <class Body>
  static void for_each_stray(int64_t, Body) {}
};

template <class Tuning>
class ExpandedRows<Tuning, int4> {
 public:
  ExpandedRows(const LinearArguments&, int64_t) {}

  static void expand(const Block<kRows, int4>& block, int row, __m512i (&weights)[1]) {
    weights[0] = expand_bytes(block.mask[row], multiples_of_row(block, row));
  }

  template <class Body>
  static void for_each_stray(int64_t, Body) {}
};

template <class Tuning>
class ExpandedRows<Tuning, dense8> {
 public:
  ExpandedRows(const LinearArguments&, int64_t) {}

  static void expand(const Block<kRows, dense8>& block, int row, __m512i (&weights)[1]) {
    weights[0] = _mm512_load_si512(block.values[row]);
  }

  template <class Body>
  static void for_each_stray(int64_t, Body) {}
};

// The strays of a row group of so many rows.
template <int Rows>
class RowStrays {
 public:
  RowStrays(const LinearArguments& a, int64_t group) : strays_(a.behind, group) {
    // Of the next row groups: nothing else brings them in time.
    strays_.prefetch_next();
    __builtin_prefetch(a.behind.first_stray + group + 2 * kLanes);
    __builtin_prefetch(a.behind.largest + (group + 2) * Rows + 64);
  }

  template <class Body>
  void for_each_stray(int64_t inputs, Body body) const {
    strays_.for_each(Rows, inputs, body);
  }

 private:
  StrayList strays_;
};

template <class Tuning>
class ExpandedRows<Tuning, dense12> : public RowStrays<kRows> {
 public:
  ExpandedRows(const LinearArguments& a, int64_t group) : RowStrays<kRows>(a, group) {
    for (int row = 0; row < kRows; ++row) {
      const uint8_t largest = a.behind.largest[group * kRows + row];
      tables_[row] = upper_entries(_mm512_set1_epi8(static_cast<char>(largest)));
    }
  }

  void expand(const Block<kRows, dense12>& block, int row, __m512i (&weights)[2]) const {
    __m512i index = _mm512_load_si512(block.upper[row % (kRows / 2)]);
    if (row >= kRows / 2) index = _mm512_srli_epi16(index, 4);
    const __m512i lower = _mm512_load_si512(block.lower[row]);
    const __m512i upper = _mm512_permutexvar_epi8(index, tables_[row]);
    weights[0] = _mm512_unpacklo_epi8(lower, upper);
    weights[1] = _mm512_unpackhi_epi8(lower, upper);
  }

 private:
  // What the upper bytes are looked up in. Of an index, the lower four bits count: tables repeat.
  __m512i tables_[kRows];
};

}  // namespace
}  // namespace permllm::cpu
