// Kept values and their places, from blocks in groups, in AVX-512 registers.
//
// Expanding brings values to all inputs, and half of the products are with zeros. Here inputs are
// brought to the values: a shuffle of x and a product for two vectors of inputs, in place of two
// products. What pruning left out meets no input: beside bfloat16 values, one that is not finite
// reaches the rows that keep it, and no other.
//
// A vector of values is of all 16 rows of a block and the two groups of a half: one value each of
// bfloat16, a pair in a lane, or two each of int8, four in a lane. So 16 sums are one vector, and
// nothing is summed across lanes. The places of eight values in their group come from 16 bits of
// mask, lowest first: where m has b bits, m - 1 has those below its lowest, and b - 1 more.
//
// Places and values are taken by parts of a block, four vectors of each, few enough to stay in
// registers beside the sums of 16 tokens. To find places takes a chain of some 20 steps, so those
// of the next part are found before this one is multiplied.
//
// KeptRows<Value>, constructed from the arguments and a row group of theirs, has
//   kParts                       of a block
//   Block(rows, block)           from which part after part is taken, in order:
//     take_places(part, places)
//     take_values(part, values)
//   vector_of_x(part)            of a token's inputs of a block, which the part meets
//   for_each_stray(inputs, body) as ExpandedRows
//
// `Products`, beside what avx512/few.h asks of them:
//   kInputs                                vectors of x that a token has in a block
//   kPlanes                                of these, meet the same places and have sums of their
//   own load_kept(x, place)                    what places refer to multiply_kept(sum, places,
//   values, x)  one shuffle and one product kOneTokenFetch                         bytes of a block
//   that are fetched ahead with one token convert16 of Outputs                   as convert, of 16
//   rows
//
// Include after every other header, in files that are compiled for AVX-512 only.
#pragma once

// The vector code comes last.
#include "cpu/avx512/few.h"

namespace permllm::cpu {
namespace {

constexpr int kPartVectors = 4;
using PartVectors = __m512i[kPartVectors];

struct Bytes {
  uint8_t of[sizeof(__m512i)];
};

template <class Body>
constexpr Bytes bytes_of(Body body) {
  Bytes bytes = {};
  for (int i = 0; i < 64; ++i) bytes.of[i] = static_cast<uint8_t>(body(i));
  return bytes;
}

inline __m512i load(const Bytes& bytes) { return _mm512_loadu_si512(bytes.of); }

constexpr int kAndThenOr = 0xea;  // a & b | c, of three vectors
constexpr int kChoose = 0xca;     // of the bits of b where a is set, else of c

// The places of the bits that 32 words of masks set, lowest first, and as much more as further bits
// are set: 7 for the first, then 6.
class PlacesOfWords {
 public:
  explicit PlacesOfWords(__m512i masks) : rest_(masks) {}

  __m512i next() {
    const __m512i below = _mm512_sub_epi16(rest_, _mm512_set1_epi16(1));
    rest_ = _mm512_and_si512(rest_, below);
    return _mm512_popcnt_epi16(below);
  }

 private:
  __m512i rest_;
};

// What a place of the words of value `value` has too much, less the first input of their group.
constexpr int excess(int value, int group) {
  return kGroupValues - 1 - value - group * kGroupInputs;
}

struct PartBytes {
  Bytes of[kPartVectors];
};

// The same of a half's int8 values, whose two groups have places among 64.
constexpr PartBytes excess_of_half(int half) {
  PartBytes bytes = {};
  for (int j = 0; j < kPartVectors; ++j) {
    bytes.of[j] = bytes_of(
        [=](int place) { return excess(value_of_vector(j, place % 2), 2 * half + place / 2 % 2); });
  }
  return bytes;
}

constexpr PartBytes kExcess[] = {excess_of_half(0), excess_of_half(1)};

// Of int8 values a part is a half.
class Int8Block {
 public:
  static constexpr int kParts = 2;

  explicit Int8Block(const uint16_t (&masks)[2][32]) : masks_(masks) {}

  void take_places(int half, PartVectors& places) {
    PlacesOfWords words(_mm512_loadu_si512(masks_[half]));
    PERMLLM_UNROLL
    for (int four = 0; four < 2; ++four) {
      // Each of these two is read before the next, and has two values of the same words.
      const __m512i first = words.next();
      const __m512i first_two = _mm512_packus_epi16(first, words.next());
      const __m512i third = words.next();
      const __m512i last_two = _mm512_packus_epi16(third, words.next());
      places[2 * four] = _mm512_unpacklo_epi8(first_two, last_two);
      places[2 * four + 1] = _mm512_unpackhi_epi8(first_two, last_two);
    }
    PERMLLM_UNROLL
    for (int j = 0; j < kPartVectors; ++j) {
      places[j] = _mm512_sub_epi8(places[j], load(kExcess[half].of[j]));
    }
  }

 private:
  const uint16_t (*masks_)[32];
};

template <class Value>
class KeptRows;

template <>
class KeptRows<int8_t> {
 public:
  static constexpr int kParts = Int8Block::kParts;

  KeptRows(const LinearArguments&, int64_t) {}

  class Block : Int8Block {
   public:
    Block(const KeptRows&, const GroupedBlock<int8_t>& block)
        : Int8Block(block.mask), block_(&block) {}

    using Int8Block::take_places;

    void take_values(int half, PartVectors& values) const {
      PERMLLM_UNROLL
      for (int i = 0; i < kPartVectors; ++i) {
        values[i] = _mm512_load_si512(block_->values[half][i]);
      }
    }

   private:
    const GroupedBlock<int8_t>* block_;
  };

  static constexpr int vector_of_x(int) { return 0; }

  template <class Body>
  static void for_each_stray(int64_t, Body) {}
};

// int8 values that four bits stand for: products q * m, q = -8..7 (layout.h), with m of the row.
template <>
class KeptRows<int4> {
 public:
  static constexpr int kParts = Int8Block::kParts;

  KeptRows(const LinearArguments&, int64_t) {}

  class Block : Int8Block {
   public:
    Block(const KeptRows&, const GroupedBlock<int4>& block)
        : Int8Block(block.mask), block_(&block), multipliers_(in_both_words(block)) {}

    using Int8Block::take_places;

    // A byte of q * m is that of a product of words where the bytes below it are zero.
    void take_values(int half, PartVectors& values) const {
      const __m512i upper = _mm512_set1_epi16(static_cast<short>(0xff00));
      take_quotients(half, values);
      PERMLLM_UNROLL
      for (__m512i& value : values) {
        const __m512i even = _mm512_mullo_epi16(value, multipliers_);
        const __m512i odd = _mm512_mullo_epi16(_mm512_and_si512(value, upper), multipliers_);
        value = _mm512_ternarylogic_epi64(upper, odd, even, kChoose);
      }
    }

    // The values before they are multiplied: q. Sums of their products are to be multiplied, by
    // add_multiples.
    void take_quotients(int half, PartVectors& quotients) const {
      PERMLLM_UNROLL
      for (int i = 0; i < kPartVectors; ++i) {
        quotients[i] = _mm512_permutexvar_epi8(nibbles(half, i), load(kQuotients));
      }
    }

    // Of 16 products of q and a byte of x the sum is a word.
    __m512i add_multiples(__m512i sum, __m512i products) const {
      return _mm512_dpwssd_epi32(sum, products, multipliers_of_lanes());
    }

   private:
    static __m512i in_both_words(const GroupedBlock<int4>& block) {
      const __m512i lanes = _mm512_cvtepu8_epi32(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(block.multipliers)));
      return _mm512_or_si512(lanes, _mm512_slli_epi32(lanes, 16));
    }

    __m512i multipliers_of_lanes() const {
      return _mm512_and_si512(multipliers_, _mm512_set1_epi32(0xffff));
    }

    // In the lower bits of bytes, below others.
    __m512i nibbles(int half, int vector) const {
      const __m512i bytes = _mm512_loadu_si512(block_->values[half][vector % 2]);
      return vector < 2 ? bytes : _mm512_srli_epi16(bytes, 4);
    }

    // By the lower four of the six bits that are looked up.
    static constexpr Bytes kQuotients =
        bytes_of([](int place) { return place % 16 + kSmallestQuotient; });

    const GroupedBlock<int4>* block_;
    __m512i multipliers_;
  };

  static constexpr int vector_of_x(int) { return 0; }

  template <class Body>
  static void for_each_stray(int64_t, Body) {}
};

// A part is one half of the eight values of a half of the block. `vpermw` takes five bits of each
// word: a place in 16, and which of the two groups.
template <>
class KeptRows<bf12> : public RowStrays<kGroupedRows> {
 public:
  static constexpr int kParts = 4;

  KeptRows(const LinearArguments& a, int64_t group)
      : RowStrays<kGroupedRows>(a, group),
        row_(load(kRow)),
        lower_table_(upper_bytes(a.behind.largest + group * kGroupedRows)),
        upper_table_(upper_bytes(a.behind.largest + group * kGroupedRows + kGroupedRows / 2)) {}

  class Block {
   public:
    Block(const KeptRows& rows, const GroupedBlock<bf12>& block)
        : rows_(&rows), block_(&block), words_(_mm512_load_si512(block.mask[0])) {}

    void take_places(int part, PartVectors& places) {
      if (part == 2) words_ = PlacesOfWords(_mm512_load_si512(block_->mask[1]));
      PERMLLM_UNROLL
      for (int i = 0; i < kPartVectors; ++i) {
        const int value = part % 2 * kPartVectors + i;
        const int words = excess(value, 0) | excess(value, 1) * (1 << 16);
        places[i] = _mm512_sub_epi16(words_.next(), _mm512_set1_epi32(words));
      }
    }

    void take_values(int part, PartVectors& values) const {
      const int half = part / 2, first_pair = part % 2 * 2;
      PERMLLM_UNROLL
      for (int i = 0; i < 2; ++i) {
        const __m512i codes = _mm512_load_si512(block_->upper[half][i]);
        const __m512i lower = _mm512_load_si512(block_->lower[half][first_pair + i]);
        const __m512i upper = first_pair == 0 ? rows_->look_up(codes, codes)
                                              : rows_->look_up(_mm512_srli_epi16(codes, 3),
                                                               _mm512_slli_epi16(codes, 1));
        values[2 * i] = _mm512_unpacklo_epi8(lower, upper);
        values[2 * i + 1] = _mm512_unpackhi_epi8(lower, upper);
      }
    }

   private:
    const KeptRows* rows_;
    const GroupedBlock<bf12>* block_;
    PlacesOfWords words_;
  };

  static constexpr int vector_of_x(int part) { return part / 2; }

 private:
  // Of a lower byte's row, times eight.
  static constexpr Bytes kRow =
      bytes_of([](int place) { return (place / 16 * 4 + place % 8 / 2) * 8; });

  // Of row r and c, without a sign, in byte 8 r + c, of eight rows.
  static __m512i upper_bytes(const uint8_t* largest) {
    constexpr __mmask64 kNotZero = 0xfefefefe'fefefefe;
    const __m512i row = load(kEighth);
    const __m512i rows =
        _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(largest)));
    const __m512i less = _mm512_set1_epi64(0x00010203'04050607);
    return _mm512_maskz_subs_epu8(kNotZero, _mm512_permutexvar_epi8(row, rows), less);
  }

  static constexpr Bytes kEighth = bytes_of([](int i) { return i / 8; });

  // c in bits 0 to 2 of `codes`, and signs in bit 7 of `signs`.
  __m512i look_up(__m512i codes, __m512i signs) const {
    const __m512i index = _mm512_ternarylogic_epi64(codes, _mm512_set1_epi8(7), row_, kAndThenOr);
    const __m512i upper = _mm512_permutex2var_epi8(lower_table_, index, upper_table_);
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    return _mm512_ternarylogic_epi64(signs, sign, upper, kAndThenOr);
  }

  __m512i row_;
  __m512i lower_table_, upper_table_;
};

// Tokens whose sums the registers hold.
constexpr int kKeptTile = 16;

// Tokens, cut into as few tiles as can be; the first have one token more, where some must.
class KeptTiles {
 public:
  explicit KeptTiles(int64_t tokens)
      : count_(ceil_div(tokens, kKeptTile)), least_(tokens / count_), larger_(tokens % count_) {}

  struct Tile {
    int64_t first, tokens;
  };

  int64_t count() const { return count_; }
  Tile tile(int64_t i) const { return {i * least_ + smaller(i, larger_), least_ + (i < larger_)}; }

 private:
  int64_t count_;
  int64_t least_;
  int64_t larger_;
};

// Where the outputs of one row group go. `Plain`: with plain stores wherever all rows exist. The
// reads that the hardware fetches ahead stop at a masked store; those that the kernel fetches do
// not.
template <class Products, bool Plain = false>
class GroupedOutputs {
 public:
  GroupedOutputs(const LinearArguments& a, const typename Products::Outputs& outputs, int64_t row)
      : arguments_(a),
        outputs_(outputs),
        row_(row),
        mask_(static_cast<__mmask16>(first_lanes(a.n - row))),
        bias_(_mm512_setzero_ps()),
        first_part_(_mm512_setzero_ps()) {
    if (a.bias == nullptr) return;
    bias_ = widen(_mm256_maskz_loadu_epi16(mask_, a.bias + row), a.half);
  }

  void store(const __m512i (&sums)[Products::kSums], int64_t row_of_x) {
    __m512 y;
    if (arguments_.parts == 2) {
      y = outputs_.convert16(sums, row_, mask_, row_of_x, first_part_);
      first_part_ = y;
      if (row_of_x % 2 == 0) return;
      first_part_ = _mm512_setzero_ps();
      y = _mm512_add_ps(y, bias_);
    } else {
      y = outputs_.convert16(sums, row_, mask_, row_of_x, bias_);
    }
    const __m256i words = round_words(y, arguments_.half);
    bf16* target = arguments_.y + arguments_.token(row_of_x) * arguments_.n + row_;
    if (Plain && mask_ == 0xffff) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), words);
    } else {
      _mm256_mask_storeu_epi16(target, mask_, words);
    }
  }

 private:
  const LinearArguments& arguments_;
  const typename Products::Outputs& outputs_;
  int64_t row_;
  __mmask16 mask_;
  __m512 bias_;
  __m512 first_part_;
};

// Adds the product of a value that no block has, with the vector of x that has its input: of no
// other row, whatever the input is.
template <class Products>
inline __m512i add_stray(__m512i sum, int row, int64_t input, bf16 value, __m512i x) {
  constexpr int kVectorInputs = kBlockInputs / Products::kInputs;
  const int place = 2 * row;
  const __m512i places = _mm512_set1_epi16(static_cast<short>(input % kVectorInputs));
  const __m512i only = _mm512_maskz_permutexvar_epi16(uint32_t{1} << place, places, x);
  return Products::multiply_one(sum, only_word(place, value), only);
}

}  // namespace
}  // namespace permllm::cpu
