// Packed weight of an N:M sparse linear layer on the CPU.
//
// Blocks are stored [row group][64-input block]. One block holds `Rows` output rows x 64 inputs:
//   Rows x uint64 mask      bit j of row r is set where input j of the block is kept
//   Rows x 32 values        the kept values of the row, bfloat16 or int8, ascending by input
// Behind the blocks of int8 values stands, for every row of every row group, the int32 sum of its
// values: kernels that shift x to be unsigned subtract the shift times this sum. The float32 scale
// of a row, w = value * scale, is no part of the packed bytes.
//
// Every row keeps exactly 32 of 64 inputs, whatever the pattern. Where undoes_permutation() of
// isa.h says so, that is all, but in groups (below). There and elsewhere the inputs stay in
// permuted order, where a row keeps four of every eight inputs, so that the place of their values
// is known. Padding, that is rows past n and inputs past k, has masks filled up to 32 bits and
// values of zero.
//
// On amx, avx512_bf16 and zen5, 32 bfloat16 values of a row are stored in 48 bytes where that loses
// nothing (bf12):
//   Rows x uint64 mask       bit 2 j of row r is set where input j is kept, and bit 2 j + 1 where
//                            input 32 + j is
//   Rows x 32 lower bytes    of the values, ascending by bit of the mask
//   Rows / 2 x 32 bytes      what the upper bytes are, of row r in the lower four bits and of row
//                            r + Rows / 2 in the upper four: the sign, and three bits c
// Without its sign an upper byte is 7 bits of the exponent. c = 1..7 says that they are u - 7 + c,
// where u is those of the largest value of the row, and c = 0 that they are zero. So a row has 14
// powers of two, or 13. A value that is smaller, of those that pruning keeps about 1 in 50,000, is
// zero in its block and stands in a list. Behind the blocks follow
//   Rows x uint8 u           of every row group
//   int32 first stray        of every row group, and one more that is their number
//   Stray                    the list, by row group and block, with room for the most that there
//                            can be: other values of the same shape take as many bytes
//   uint8 order              in groups, of every input of every block: which of the block's 64
//                            inputs of x it is
//
// int8 values take 4 bits each where that loses nothing (int4): where those of every row of every
// block are multiples q * m, q = -8..7, of some m = 1..128. Beside masks in the order of x
//   Rows / 2 x 32 bytes      q + 8, of row r in the lower four bits and of row r + Rows / 2 in the
//                            upper four, ascending by input
//   Rows x uint8 m           0 of rows past n
// and behind the blocks what stands behind those of int8 values, the sums of q * m. So blocks are
// no multiples of a cache line.
//
// Where has_groups() of isa.h says so, and every row keeps eight of every 16 inputs, as with 2:4,
// 4:8 and 8:16, blocks of int8 values and of 12 bits are in groups: of 16 rows x 64 inputs in four
// groups of 16 inputs, in permuted order. A half of a block is two groups, with
//   2 x 32 x uint16 mask     word 2 r + g of a half is of row r and the half's group g
// and then the eight values of every row and group, ascending by input,
//   2 x 4 x 64 values        of int8: [half][j]; byte 4 r + 2 g + i of j is value
//                            j / 2 * 4 + j % 2 + 2 i
// or, in 4 bits,
//   2 x 2 x 64 bytes         q + 8 of j = 0, 1 in the lower four bits, j + 2 in the upper
//   16 x uint8 m
// or, in 12 bits,
//   2 x 2 x 64 bytes         what the upper bytes are, [half][pairs 0 and 2, or 1 and 3]: c of the
//                            first of two pairs in bits 0 to 2 and of the second in bits 3 to 5,
//                            the second's sign in bit 6 and the first's in bit 7
//   2 x 4 x 64 lower bytes   [half][pair of values]; byte 16 i + 8 j + w is of value j of the pair
//                            and of the row and group of word 8 i + w of the masks
// What stands behind the blocks is the same, and behind that the order.
//
// Where has_lanes() of isa.h says so, blocks are in lanes, but for masks that do not keep eight of
// every 16 inputs: a lane is 32 bits of one row. Value 4 f + i of a row, ascending by input, is the
// i-th of its four f, and has
//   values                       [f][row][i] of int8, [f][i / 2][row][i % 2] of bfloat16
// Before these stands where its input is. Where a row keeps two of every four inputs
//   2 x Rows x 4 uint8 places    the input modulo 4, in bits 2 (f % 4).. of byte [f / 4][row][i]
// else, as the value s = 4 (f % 2) + i of those of 16 inputs
//   4 x Rows x 4 uint8 places    which of these, less s (0..8), in the lower four bits of byte
//                                [f / 2][row][i] for even f, and in the upper four for odd f
// The sums of int8 values stand behind the blocks, as above. Padding is values of zero.
//
// Of int8 values that take 4 bits a byte of
//   values                       [f][row][i], f < 4
// has q + 8 of four f in the lower four bits and of four f + 4 in the upper four. Here m
// stands behind the sums:
//   uint8 m                      of every row of every block
//
// The rows of the output head, which are dense, are stored in 12 bits too (dense12): blocks of
//   Rows x 64 lower bytes    in an order in which two vectors of bytes become two of words: on amx
//                            that of the masks above; else byte 16 i + j is of input 8 i + j, and
//                            byte 16 i + 8 + j of input 32 + 8 i + j (j < 8)
//   Rows / 2 x 64 bytes      what the upper bytes are
// and behind them the same, but for the order. Rounded to int8 with a scale for each row (dense8)
// they are blocks of
//   Rows x 64 values
// with the sums of int8 values behind them. Padding is zeros.
//
// This header is included by files that are compiled for one instruction set: its functions are
// static, so that no copy of theirs can be linked into a file that is compiled for another.
#pragma once

#include <cstdint>

namespace permllm::cpu {

using bf16 = uint16_t;  // the bits of a bfloat16

// The bits of a float16; a type of its own, so that none is taken for a bfloat16.
struct fp16 {
  uint16_t bits;
};

// bfloat16 in 12 bits, as types of values: of N:M sparse rows, and of dense ones.
struct bf12 {};
struct dense12 {};

// int8 values of dense rows.
struct dense8 {};

// int8 values of sparse rows in 4 bits.
struct int4 {};

template <class Value>
constexpr bool kInTwelveBits = false;
template <>
constexpr bool kInTwelveBits<bf12> = true;
template <>
constexpr bool kInTwelveBits<dense12> = true;

// Of a layer's values at most one in so many may be a stray: with 4 tokens and one in 2600, strays
// take 3 % of the time.
constexpr int64_t kValuesOfStray = 512;

constexpr int kBlockInputs = 64;
constexpr int kBlockValues = 32;

// Part of the format, not tuned: a tile has 16 rows, and 8 rows of masks are a cache line.
constexpr int kAmxRows = 16;      // 1152 bytes, in 12 bits 896, int8 640 or, in 4 bits, 400
constexpr int kAvx512Rows = 8;    // 576 bytes, int8 320 or, in 4 bits, 200
constexpr int kGroupedRows = 16;  // in groups: in 12 bits 896 bytes, int8 640 or, in 4 bits, 400
constexpr int kPortableRows = 8;  // in lanes 576 bytes too, int8 320 or, in 4 bits, 192, and 64
                                  // more if not of 2:4

template <int Rows, class Value = bf16>
struct alignas(64) Block {
  uint64_t mask[Rows];
  Value values[Rows][kBlockValues];
};

template <int Rows>
struct alignas(64) Block<Rows, bf12> {
  uint64_t mask[Rows];
  uint8_t lower[Rows][kBlockValues];
  uint8_t upper[Rows / 2][kBlockValues];
};

template <int Rows>
struct Block<Rows, int4> {
  uint64_t mask[Rows];
  uint8_t values[Rows / 2][kBlockValues];
  uint8_t multipliers[Rows];
};

template <int Rows>
struct alignas(64) Block<Rows, dense12> {
  uint8_t lower[Rows][kBlockInputs];
  uint8_t upper[Rows / 2][kBlockInputs];
};

template <int Rows>
struct alignas(64) Block<Rows, dense8> {
  int8_t values[Rows][kBlockInputs];
};

// In groups: their inputs, the values that a row keeps of one, and the groups of a block.
constexpr int kGroupInputs = 16;
constexpr int kGroupValues = 8;
constexpr int kGroups = kBlockInputs / kGroupInputs;

// Of the masks of a half, the word of a row and one of its two groups.
constexpr int mask_word(int row, int group) { return 2 * row + group; }

template <class Value>
struct GroupedBlock;

template <>
struct alignas(64) GroupedBlock<int8_t> {
  uint16_t mask[2][32];
  int8_t values[2][4][64];
};

template <>
struct GroupedBlock<int4> {
  uint16_t mask[2][32];
  uint8_t values[2][2][64];
  uint8_t multipliers[kGroupedRows];
};

template <>
struct alignas(64) GroupedBlock<bf12> {
  uint16_t mask[2][32];
  uint8_t upper[2][2][64];
  uint8_t lower[2][4][64];
};

// Which of the eight values of a row and group an int8 one is, `i` of two of vector j.
constexpr int value_of_vector(int j, int i) { return j / 2 * 4 + j % 2 + 2 * i; }

// Values that a lane has a byte for, and the fours of them that a block has of a row.
constexpr int kLaneValues = 4;
constexpr int kFours = kBlockValues / kLaneValues;

// `Of`: 4 of 2:4, 16 of any eight of 16.
template <class Value, int Of>
struct LaneBlock;

template <int Of>
struct LanePlaces {
  static_assert(Of == 4 || Of == 16);
  static constexpr int kFoursOfByte = Of == 4 ? 4 : 2;
  uint8_t places[kFours / kFoursOfByte][kPortableRows][kLaneValues];
};

template <int Of>
struct alignas(32) LaneBlock<int8_t, Of> : LanePlaces<Of> {
  int8_t values[kFours][kPortableRows][kLaneValues];
};

template <int Of>
struct alignas(32) LaneBlock<int4, Of> : LanePlaces<Of> {
  uint8_t values[kFours / 2][kPortableRows][kLaneValues];
};

template <int Of>
struct alignas(32) LaneBlock<bf16, Of> : LanePlaces<Of> {
  bf16 values[kFours][kLaneValues / 2][kPortableRows][2];
};

// A bfloat16 value that its row has no 12 bits for.
struct Stray {
  uint32_t input;  // in the order of the blocks
  uint16_t row;    // of the row group
  bf16 value;
};

// Row groups that the AMX kernels multiply side by side: as many as the tile registers hold sums
// of. Threads share out such pairs, when a weight is packed and when it is multiplied.
constexpr int kAmxGroups = 2;

// What the values are, and how they lie. The numbers are part of the metadata.
enum class ValueType : int64_t {
  kBfloat16 = 0,
  kInt8 = 1,
  kBfloat12 = 2,
  kDense12 = 3,
  kDense8 = 4,
  // In lanes, of 2:4 and of others.
  kBfloat16Of4 = 5,
  kInt8Of4 = 6,
  kBfloat16Of16 = 7,
  kInt8Of16 = 8,
  kInt4Of4 = 9,
  kInt4Of16 = 10,
  // Not in lanes.
  kInt4 = 11,
  // In groups.
  kGroupedBfloat12 = 12,
  kGroupedInt8 = 13,
  kGroupedInt4 = 14
};

// int8 values that take 4 bits each.
static constexpr bool in_four_bits(ValueType type) {
  return type == ValueType::kInt4 || type == ValueType::kInt4Of4 || type == ValueType::kInt4Of16 ||
         type == ValueType::kGroupedInt4;
}

// Their rows have a scale each.
static constexpr bool in_int8(ValueType type) {
  return type == ValueType::kInt8 || type == ValueType::kDense8 || type == ValueType::kInt8Of4 ||
         type == ValueType::kInt8Of16 || type == ValueType::kGroupedInt8 || in_four_bits(type);
}

static constexpr bool of_four(ValueType type) {
  return type == ValueType::kBfloat16Of4 || type == ValueType::kInt8Of4 ||
         type == ValueType::kInt4Of4;
}

static constexpr bool in_lanes(ValueType type) {
  return of_four(type) || type == ValueType::kBfloat16Of16 || type == ValueType::kInt8Of16 ||
         type == ValueType::kInt4Of16;
}

// Their multipliers are no part of the blocks.
static constexpr bool has_multipliers_behind(ValueType type) {
  return in_four_bits(type) && in_lanes(type);
}

static constexpr bool in_twelve_bits(ValueType type) {
  return type == ValueType::kBfloat12 || type == ValueType::kDense12 ||
         type == ValueType::kGroupedBfloat12;
}

static constexpr bool in_groups(ValueType type) {
  return type == ValueType::kGroupedBfloat12 || type == ValueType::kGroupedInt8 ||
         type == ValueType::kGroupedInt4;
}

// Of the output head: rows without a mask.
static constexpr bool is_dense(ValueType type) {
  return type == ValueType::kDense12 || type == ValueType::kDense8;
}

// Sums of products of int8 values with 8 bits of x fit an int32 up to this many inputs.
constexpr int64_t kInt8Inputs = int64_t{1} << 17;
// The same of dense rows, which keep all inputs.
constexpr int64_t kDense8Inputs = int64_t{1} << 16;

// Kernels may read this far past the last block (prefetch excluded): the allocation adds it.
constexpr int64_t kTailBytes = 128;

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The int64 metadata tensor beside the packed bytes.
namespace header {
enum Field : int { kLayout, kIsa, kRows, kOutputs, kInputs, kValues, kStrays, kSize };
}
constexpr int64_t kLayoutVersion = 0x7065726d'00000007;  // "perm", then the version

}  // namespace permllm::cpu
