// Where AVX2 finds values in lanes (layout.h), and their inputs.
//
// Include after every other header, in files that are compiled for AVX2 only.
#pragma once

#include <immintrin.h>

#include "cpu/vector/vector.h"

namespace permllm::cpu {
namespace {

template <class Array>
inline __m256i load_bits(const Array& aligned) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(&aligned));
}

// Four values of every row of a block, a byte each; of those in 4 bits what is multiplied.
template <int Of>
inline __m256i bytes_of(const LaneBlock<int8_t, Of>& block, int four) {
  return load_bits(block.values[four]);
}

template <int Of>
inline __m256i bytes_of(const LaneBlock<int4, Of>& block, int four) {
  const __m256i both = load_bits(block.values[four % (kFours / 2)]);
  const __m256i own = four < kFours / 2 ? both : _mm256_srli_epi16(both, 4);
  return _mm256_sub_epi8(_mm256_and_si256(own, _mm256_set1_epi8(15)), _mm256_set1_epi8(8));
}

// A byte of each row, widened to its lane.
inline __m256i widen_rows(const uint8_t* bytes) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
}

// Where the inputs of four values of every row of a block are.
template <int Of>
class LoadedPlaces {
  static constexpr int kFoursOfByte = LanePlaces<Of>::kFoursOfByte, kBits = 8 / kFoursOfByte;

 public:
  LoadedPlaces(const LanePlaces<Of>& block, int four)
      : places_(load_bits(block.places[four / kFoursOfByte])), four_(four) {}

  // Of all bytes, which of the 16 inputs from 16 (four / 2) on.
  __m256i bytes() const {
    const __m256i own =
        _mm256_and_si256(_mm256_srli_epi32(places_, shift(0)), _mm256_set1_epi8((1 << kBits) - 1));
    const bool odd = four_ % 2 != 0;
    if constexpr (Of == 4) {
      return _mm256_or_si256(own, _mm256_set1_epi32(odd ? 0x0c0c0808 : 0x04040000));
    } else {
      return _mm256_add_epi8(own, _mm256_set1_epi32(odd ? 0x07060504 : 0x03020100));
    }
  }

  // Of one of the four, what is stored, in the lower bits of each lane; the bits above are
  // anything.
  __m256i lanes(int value) const { return _mm256_srli_epi32(places_, shift(value)); }

  // The same at the top of each lane; the bits below are anything.
  __m256i upper_lanes(int value) const {
    return _mm256_slli_epi32(places_, 32 - kBits - shift(value));
  }

  // The same, which of the block's inputs.
  __m256i inputs(int value) const {
    const int i = kLaneValues * four_ + value, first = i * 2 / Of * Of;
    const __m256i own =
        Of == 4 ? lanes(value) : _mm256_add_epi32(lanes(value), _mm256_set1_epi32(i % (Of / 2)));
    return _mm256_add_epi32(_mm256_and_si256(own, _mm256_set1_epi32(Of - 1)),
                            _mm256_set1_epi32(first));
  }

 private:
  int shift(int value) const { return 8 * value + kBits * (four_ % kFoursOfByte); }

  __m256i places_;
  int four_;
};

}  // namespace
}  // namespace permllm::cpu
