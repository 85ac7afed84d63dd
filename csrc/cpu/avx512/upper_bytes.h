// The upper bytes of bfloat16 values in 12 bits, and the values that 12 bits lack (layout.h).
//
// Include after every other header, in files that are compiled for AVX-512 only.
#pragma once

#include <immintrin.h>

#include "cpu/kernels.h"

namespace permllm::cpu {
namespace {

// What four bits of an upper byte are looked up in: 16 entries in each 128 bits, of the row whose
// largest byte is in all of these.
inline __m512i upper_entries(__m512i largest) {
  // The entries of c = 0 and of its negative, and what the others have less than the largest.
  constexpr __mmask64 kNotZero = 0xfefefefe'fefefefe, kNegative = 0xff00ff00'ff00ff00;
  const __m512i less = _mm512_set1_epi64(0x00010203'04050607);
  const __m512i signs = _mm512_maskz_set1_epi8(kNegative, static_cast<char>(0x80));
  return _mm512_or_si512(_mm512_maskz_subs_epu8(kNotZero, largest, less), signs);
}

// The strays of a row group. They name places in memory, so that one that was damaged in memory
// must be found here: the list is cut to what the header says, and a stray that is in no row or has
// no input is left out; where the list is taken from its front, those behind it in the row group
// are too.
class StrayList {
 public:
  StrayList() = default;
  StrayList(const BehindBlocks& behind, int64_t group)
      : begin_(first_of(behind, group)), end_(first_of(behind, group + 1)) {}

  // Leaves out those before an input: the list ascends by block, where it was not damaged.
  void skip_to(int64_t input) {
    for (int64_t left = end_ - begin_; left > 0;) {
      const int64_t half = left / 2;
      const bool before = begin_[half].input < input;
      begin_ += before ? half + 1 : 0;
      left = before ? left - half - 1 : half;
    }
  }

  // The next ones, before an input, as for_each; they are in the list no more.
  template <class Body>
  void take(int64_t rows, int64_t input, Body body) {
    for (; begin_ < end_ && begin_->input < input; ++begin_) {
      if (begin_->row < rows) body(begin_->row, int64_t{begin_->input}, begin_->value);
    }
  }

  // body(row, input, value)
  template <class Body>
  void for_each(int64_t rows, int64_t inputs, Body body) const {
    for (const Stray* stray = begin_; stray < end_; ++stray) {
      if (stray->row >= rows || stray->input >= inputs) continue;
      body(stray->row, int64_t{stray->input}, stray->value);
    }
  }

  // Of the next row groups: nothing else brings them in time.
  void prefetch_next() const {
    constexpr int kLineStrays = 64 / sizeof(Stray);
    __builtin_prefetch(end_);
    __builtin_prefetch(end_ + kLineStrays);
  }

 private:
  static const Stray* first_of(const BehindBlocks& behind, int64_t group) {
    const int64_t first = behind.first_stray[group];
    return behind.strays + (first < 0 ? 0 : smaller(first, behind.stray_count));
  }

  const Stray* begin_ = nullptr;
  const Stray* end_ = nullptr;
};

}  // namespace
}  // namespace permllm::cpu
