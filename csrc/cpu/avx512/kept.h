// Kept values and their places, from blocks in slots, in AVX-512 registers.
//
// Expanding brings values to all inputs, and half of the products are with zeros. Here inputs are
// brought to the values: a shuffle of x and a product for two vectors of inputs, in place of two
// products. A vector is a slot of all eight rows; each has four of its values there, in a pair of
// lanes. What pruning left out meets no input: beside bfloat16 values, one that is not finite
// reaches the rows that keep it, and no other.
//
// KeptRows<Value>, constructed from the arguments and a row group of theirs, has
//   kVectors                     of places and of values that a slot of a block is
//   take(block, places, values)  all of these, [vector][slot]
//   for_each_stray(inputs, body) as ExpandedRows
//
// `Products`, beside what avx512/few.h asks of them:
//   kInputs                                vectors of x that a token has in a block. Each meets the
//                                          places and values of the same number, or the only ones
//   multiply_kept(sum, places, values, x)  one shuffle and one product
//   kOneTokenFetch                         bytes of a block that are fetched ahead with one token
//   kLeastVectors                          of x that meet a block: the last token is repeated
//   kQuotientsAlone                        whether one token meets what KeptRows<int4> gives by
//                                          take_quotients()
//
// Include after every other header, in files that are compiled for AVX-512 only.
#pragma once

// The vector code comes last.
#include "cpu/avx512/few.h"

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

inline __m512i load(const Bytes& bytes) { return _mm512_loadu_si512(bytes.of); }

// Which of eight inputs is the one of a slot, by a mask without its highest bit, which follows from
// the others. Where these are not of four inputs, it is any.
constexpr int input_of_slot(int slot, int mask) {
  const int last = __builtin_popcount(mask) < kSlots ? 7 : 0;
  for (int input = 0; input < 7; ++input) {
    if ((mask >> input & 1) != 0 && slot-- == 0) return input;
  }
  return last;
}

struct SlotTables {
  Bytes lower[kSlots], upper[kSlots];  // of masks below 64, and of others
};

constexpr SlotTables slot_tables() {
  SlotTables tables = {};
  for (int slot = 0; slot < kSlots; ++slot) {
    tables.lower[slot] = bytes_of([=](int mask) { return input_of_slot(slot, mask); });
    tables.upper[slot] = bytes_of([=](int mask) { return input_of_slot(slot, 64 + mask); });
  }
  return tables;
}

alignas(64) constexpr SlotTables kSlotTables = slot_tables();

// Places within a vector of x, of as many masks as a block has.
class Places {
 public:
  explicit Places(const Bytes& first_inputs) : first_inputs_(load(first_inputs)) {
    PERMLLM_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      lower_[slot] = load(kSlotTables.lower[slot]);
      upper_[slot] = load(kSlotTables.upper[slot]);
    }
  }

  __m512i of(int slot, __m512i masks) const {
    const __m512i input = _mm512_permutex2var_epi8(lower_[slot], masks, upper_[slot]);
    return _mm512_or_si512(input, first_inputs_);
  }

 private:
  __m512i lower_[kSlots], upper_[kSlots];
  __m512i first_inputs_;
};

constexpr int kAndThenOr = 0xea;   // a & b | c, of three vectors
constexpr int kAndThenXor = 0x6a;  // (a & b) ^ c

template <class Value>
class KeptRows;

template <>
class KeptRows<int8_t> {
 public:
  static constexpr int kVectors = 1;
  static constexpr Bytes kFirstInputs = bytes_of([](int place) { return place % 8 * 8; });

  KeptRows(const LinearArguments&, int64_t) : places_(kFirstInputs) {}

  void take(const SlotBlock<int8_t>& block, __m512i (&places)[1][kSlots],
            __m512i (&values)[1][kSlots]) const {
    const __m512i masks = _mm512_load_si512(block.mask);
    PERMLLM_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      places[0][slot] = places_.of(slot, masks);
      values[0][slot] = _mm512_load_si512(block.values[slot]);
    }
  }

  template <class Body>
  static void for_each_stray(int64_t, Body) {}

 private:
  Places places_;
};

// The q of the lower byte of a word, by a place in the table of one multiplier; the upper byte is
// of q + 1.
constexpr int even_quotient(int place) { return kSmallestQuotient + place % kQuotients / 2 * 2; }

// int8 values that four bits stand for (avx512/multiples.h), of the multipliers of eight rows.
// Their products are two tables of 64.
class MultiplesOfRows {
 public:
  explicit MultiplesOfRows(const uint8_t (&multipliers)[kRows]) {
    int64_t bytes;
    __builtin_memcpy(&bytes, multipliers, sizeof(bytes));
    const __m512i all = _mm512_set1_epi64(bytes);
    lower_ = multiply(_mm512_shuffle_epi8(all, load(kLowerRows)));
    upper_ = multiply(_mm512_shuffle_epi8(all, load(kUpperRows)));
  }

  // `bytes`, of which the lower four bits count, are in the order of a slot.
  __m512i of(__m512i bytes) const {
    const __m512i index =
        _mm512_ternarylogic_epi64(bytes, _mm512_set1_epi8(kQuotients - 1), load(kRow), kAndThenOr);
    return _mm512_permutex2var_epi8(lower_, index, upper_);
  }

 private:
  static constexpr int kZero = 0x80;  // of a shuffle

  // In every 128 bits the multiplier of one row, in the lower bytes of words.
  static constexpr Bytes kLowerRows =
      bytes_of([](int place) { return place % 2 == 0 ? place / 16 : kZero; });
  static constexpr Bytes kUpperRows =
      bytes_of([](int place) { return place % 2 == 0 ? kRows / 2 + place / 16 : kZero; });

  // A word is to be q * m and, in its upper byte, (q + 1) * m. That is one product, but for a carry
  // of -1 where q is negative: where one of the two fits a byte, q * m is at least -256.
  static constexpr Bytes kFactors = bytes_of([](int place) {
    const int q = even_quotient(place), factor = 256 * (q + 1) + q;
    return factor >> place % 2 * 8;
  });
  static constexpr Bytes kCarries =
      bytes_of([](int place) { return even_quotient(place) < 0 ? place % 2 : 0; });

  // Of a value's place, times 16.
  static constexpr Bytes kRow = bytes_of([](int place) { return place / 8 * kQuotients; });

  static __m512i multiply(__m512i multipliers) {
    return _mm512_add_epi8(_mm512_mullo_epi16(multipliers, load(kFactors)), load(kCarries));
  }

  __m512i lower_, upper_;
};

template <>
class KeptRows<int4> {
 public:
  static constexpr int kVectors = 1;

  KeptRows(const LinearArguments&, int64_t) : places_(KeptRows<int8_t>::kFirstInputs) {}

  void take(const SlotBlock<int4>& block, __m512i (&places)[1][kSlots],
            __m512i (&values)[1][kSlots]) const {
    const __m512i masks = _mm512_loadu_si512(block.mask);
    const MultiplesOfRows multiples(block.multipliers);
    PERMLLM_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      places[0][slot] = places_.of(slot, masks);
      const __m512i bytes = _mm512_loadu_si512(block.values[slot % (kSlots / 2)]);
      values[0][slot] = multiples.of(slot < kSlots / 2 ? bytes : _mm512_srli_epi16(bytes, 4));
    }
  }

  // The values before they are multiplied: 16 q. Sums of their products are to be multiplied, by
  // add_multiples.
  void take_quotients(const SlotBlock<int4>& block, __m512i (&places)[kSlots],
                      __m512i (&quotients)[kSlots]) const {
    const __m512i masks = _mm512_loadu_si512(block.mask);
    // Of bytes that hold q + 8, with the highest bit of q + 8 turned round.
    const __m512i upper = _mm512_set1_epi8(static_cast<char>(0xf0));
    const __m512i highest = _mm512_set1_epi8(static_cast<char>(0x80));
    PERMLLM_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      places[slot] = places_.of(slot, masks);
      const __m512i bytes = _mm512_loadu_si512(block.values[slot % (kSlots / 2)]);
      quotients[slot] = _mm512_ternarylogic_epi64(
          slot < kSlots / 2 ? _mm512_slli_epi16(bytes, 4) : bytes, upper, highest, kAndThenXor);
    }
  }

  // Of 16 products of 16 q and a byte of x the sum is below 2^19, and without the 16 a word.
  static __m512i add_multiples(__m512i sum, __m512i products, const uint8_t (&multipliers)[kRows]) {
    int64_t bytes;
    __builtin_memcpy(&bytes, multipliers, sizeof(bytes));
    const __m512i own = _mm512_shuffle_epi8(_mm512_set1_epi64(bytes), load(kRowOfLane));
    return _mm512_dpwssd_epi32(sum, _mm512_srai_epi32(products, 4), own);
  }

  template <class Body>
  static void for_each_stray(int64_t, Body) {}

 private:
  // To the lower bytes of 32 bits.
  static constexpr Bytes kRowOfLane =
      bytes_of([](int place) { return place % 4 == 0 ? place / 8 : 0x80; });

  Places places_;
};

// A vector is a half of the block: 32 inputs. `vpermw` takes five bits of each word, so that the
// places of the first half may have those of the second above them.
template <>
class KeptRows<bf12> : public RowStrays {
 public:
  static constexpr int kVectors = 2;

  KeptRows(const LinearArguments& a, int64_t group)
      : RowStrays(a, group),
        places_(kFirstInputs),
        row_(_mm512_loadu_si512(kRow.of)),
        table_(upper_bytes(a.behind.largest + group * kRows)) {}

  void take(const SlotBlock<bf12>& block, __m512i (&places)[2][kSlots],
            __m512i (&values)[2][kSlots]) const {
    const __m512i masks = _mm512_load_si512(block.mask);
    const __m512i codes[] = {_mm512_load_si512(block.upper[0]), _mm512_load_si512(block.upper[1])};
    PERMLLM_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      places[0][slot] = places_.of(slot, masks);
      places[1][slot] = _mm512_srli_epi16(places[0][slot], 8);
      const __m512i lower = _mm512_load_si512(block.lower[slot]);
      const __m512i upper = slot < kSlots / 2
                                ? look_up(codes[slot], codes[slot])
                                : look_up(_mm512_srli_epi16(codes[slot - kSlots / 2], 3),
                                          _mm512_slli_epi16(codes[slot - kSlots / 2], 1));
      values[0][slot] = _mm512_unpacklo_epi8(lower, upper);
      values[1][slot] = _mm512_unpackhi_epi8(lower, upper);
    }
  }

 private:
  static constexpr Bytes kFirstInputs = bytes_of([](int place) { return place / 2 % 4 * 8; });
  // Of a value's place, times eight.
  static constexpr Bytes kRow =
      bytes_of([](int place) { return (place / 16 * 2 + place % 8 / 4) * 8; });

  // Of row r and c, without a sign, in byte 8 r + c.
  static __m512i upper_bytes(const uint8_t* largest) {
    constexpr __mmask64 kNotZero = 0xfefefefe'fefefefe;
    const __m512i row = _mm512_loadu_si512(kEighth.of);
    const __m512i rows =
        _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(largest)));
    const __m512i less = _mm512_set1_epi64(0x00010203'04050607);
    return _mm512_maskz_subs_epu8(kNotZero, _mm512_permutexvar_epi8(row, rows), less);
  }

  static constexpr Bytes kEighth = bytes_of([](int i) { return i / 8; });

  // c in bits 0 to 2 of `codes`, and signs in bit 7 of `signs`.
  __m512i look_up(__m512i codes, __m512i signs) const {
    const __m512i index = _mm512_ternarylogic_epi64(codes, _mm512_set1_epi8(7), row_, kAndThenOr);
    const __m512i upper = _mm512_permutexvar_epi8(index, table_);
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    return _mm512_ternarylogic_epi64(signs, sign, upper, kAndThenOr);
  }

  Places places_;
  __m512i row_;
  __m512i table_;
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

// Vector i of the inputs of a block meets vector i of its places and values, or the only one.
template <class Rows>
constexpr int vector_of(int i) {
  return Rows::kVectors == 1 ? 0 : i;
}

// Stores a token's outputs of a row group, from its sums.
template <class Products, class Outputs>
inline void store_kept(Outputs& outputs, const __m512i (&sums)[Products::kSums], int64_t token) {
  __m256i totals[Products::kSums];
  PERMLLM_UNROLL
  for (int s = 0; s < Products::kSums; ++s) {
    totals[s] = _mm512_cvtepi64_epi32(Products::add(sums[s], _mm512_srli_epi64(sums[s], 32)));
  }
  outputs.store(totals, token);
}

// Adds the product of a value that no block has, with the vector of x that has its input: of no
// other row, whatever the input is.
template <class Products>
inline __m512i add_stray(__m512i sum, int row, int64_t input, bf16 value, __m512i x) {
  constexpr int kVectorInputs = kBlockInputs / Products::kInputs;
  const int place = 4 * row;
  const __m512i places = _mm512_set1_epi16(static_cast<short>(input % kVectorInputs));
  const __m512i only = _mm512_maskz_permutexvar_epi16(uint32_t{1} << place, places, x);
  return Products::multiply_one(sum, only_word(place, value), only);
}

}  // namespace
}  // namespace permllm::cpu
