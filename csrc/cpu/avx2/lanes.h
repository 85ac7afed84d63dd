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

// The values of inputs 8 eight.. of a block, a byte each; of those in 4 bits what is multiplied.
template <int Of>
inline __m256i bytes_of(const LaneBlock<int8_t, Of>& block, int eight) {
  return load_bits(block.values[eight]);
}

template <int Of>
inline __m256i bytes_of(const LaneBlock<int4, Of>& block, int eight) {
  const __m256i both = load_bits(block.values[eight % (kEights / 2)]);
  const __m256i own = eight < kEights / 2 ? both : _mm256_srli_epi16(both, 4);
  return _mm256_sub_epi8(_mm256_and_si256(own, _mm256_set1_epi8(15)), _mm256_set1_epi8(8));
}

// A byte of each row, widened to its lane.
inline __m256i widen_rows(const uint8_t* bytes) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
}

// The places of the values of inputs 8 eight.. of a block.
template <int Of>
class LoadedPlaces {
 public:
  LoadedPlaces(const LanePlaces<Of>& block, int eight)
      : places_(load_bits(block.places[eight / 4])), eight_(eight) {
    if constexpr (Of == 8) fours_ = load_bits(block.fours);
  }

  // Of all bytes, the places among the eight inputs.
  __m256i bytes() const {
    const __m256i modulo = _mm256_and_si256(down(places_, shift(0)), _mm256_set1_epi8(3));
    if constexpr (Of == 4) {
      return _mm256_or_si256(modulo, _mm256_set1_epi32(0x04040000));
    } else {
      return _mm256_or_si256(modulo, four(0, _mm256_set1_epi8(4)));
    }
  }

  // Of the values in this slot, in the lower bits of each lane, among as many inputs as Of; the
  // bits above are anything.
  __m256i lanes(int slot) const {
    const __m256i modulo = down(places_, shift(slot));
    if constexpr (Of == 4) {
      return modulo;
    } else {
      return _mm256_or_si256(_mm256_and_si256(modulo, _mm256_set1_epi32(3)),
                             four(slot, _mm256_set1_epi32(4)));
    }
  }

 private:
  int shift(int slot) const { return 8 * slot + 2 * (eight_ % 4); }

  // The bit of `fours` of this slot, where `bit` has the third of a lane or byte.
  __m256i four(int slot, __m256i bit) const {
    return _mm256_and_si256(down(fours_, 8 * slot + eight_ - 2), bit);
  }

  static __m256i down(__m256i lanes, int bits) {
    return bits >= 0 ? _mm256_srli_epi32(lanes, bits) : _mm256_slli_epi32(lanes, -bits);
  }

  __m256i places_;
  __m256i fours_ = {};  // of layers that are not 2:4
  int eight_;
};

}  // namespace
}  // namespace permllm::cpu
