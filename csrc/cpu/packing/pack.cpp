#include "cpu/packing/pack.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>
#include <type_traits>

#include "cpu/linear.h"
#include "cpu/packing/block_layout.h"
#include "cpu/packing/four_bits.h"
#include "cpu/packing/twelve_bits.h"
#include "cpu/threads/threads.h"

namespace permllm::cpu {
namespace {

constexpr int64_t kLineBytes = 64;

constexpr uint64_t kPaddingMask = 0x0f0f0f0f'0f0f0f0f;  // four of every eight

uint64_t load_mask(const uint8_t* bytes, int64_t inputs) {
  uint64_t mask = 0;
  for (int64_t i = 0; i < inputs / 8; ++i) mask |= uint64_t{bytes[i]} << (8 * i);
  return mask;
}

// Whether every row keeps two of every four inputs.
bool keeps_two_of_four(const PackArguments& a) {
  const int64_t bytes = a.n * (a.k / 8);
  for (int64_t first = 0; first < bytes; first += sizeof(uint64_t)) {
    uint64_t mask = 0x3333333333333333;
    std::memcpy(&mask, a.mask + first, std::min<int64_t>(sizeof(mask), bytes - first));
    const uint64_t pairs = mask - (mask >> 1 & 0x5555555555555555);
    const uint64_t fours = (pairs & 0x3333333333333333) + (pairs >> 2 & 0x3333333333333333);
    if (fours != 0x2222222222222222) return false;
  }
  return true;
}

// Whether every row keeps eight of every 16 inputs.
bool keeps_eight_of_sixteen(const PackArguments& a) {
  if (a.group <= kGroupInputs) return true;
  for (int64_t row = 0; row < a.n; ++row) {
    for (int64_t first = 0; first < a.k; first += kBlockInputs) {
      const int64_t inputs = std::min<int64_t>(kBlockInputs, a.k - first);
      uint64_t mask = load_mask(a.mask + (row * a.k + first) / 8, inputs);
      if (inputs < kBlockInputs) mask |= kPaddingMask << inputs;
      for (; mask != 0; mask >>= 16) {
        if (__builtin_popcount(static_cast<uint16_t>(mask)) != 8) return false;
      }
    }
  }
  return true;
}

bool takes_four_bits(const PackArguments& a) {
  return fit_four_bits(static_cast<const int8_t*>(a.values), a.n, a.k);
}

// Which blocks in lanes take the layer, or those with masks.
ValueType lanes_of(const PackArguments& a) {
  const bool of_four = keeps_two_of_four(a);
  if (!of_four && !keeps_eight_of_sixteen(a)) return a.type;
  if (!in_int8(a.type)) return of_four ? ValueType::kBfloat16Of4 : ValueType::kBfloat16Of16;
  if (takes_four_bits(a)) return of_four ? ValueType::kInt4Of4 : ValueType::kInt4Of16;
  return of_four ? ValueType::kInt8Of4 : ValueType::kInt8Of16;
}

// Of a row of a block, the first group that breaks the pattern. The last may have fewer inputs.
BadMask check(const PackArguments& a, uint64_t mask, int64_t row, int64_t first, int64_t inputs) {
  for (int64_t i = 0; i < inputs; i += a.group) {
    const int64_t count = std::min(a.group, inputs - i);
    const uint64_t own = count == kBlockInputs ? mask : mask >> i & ((uint64_t{1} << count) - 1);
    const int kept = __builtin_popcountll(own);
    if (kept * 2 != count) return {row, first + i, count, kept};
  }
  return {};
}

// Which of a block's inputs, the first of which is `first`, is in place j of the permuted order.
int64_t unpermuted(const PackArguments& a, int64_t first, int64_t j) {
  return j / a.block_size * a.block_size + a.permutation[first + j];
}

void write_order(const PackArguments& a, uint8_t* order) {
  for (int64_t i = 0; i < a.k; ++i) {
    const int64_t j = i % kBlockInputs;
    order[i] = static_cast<uint8_t>(a.permutation == nullptr ? j : unpermuted(a, i - j, j));
  }
  const int64_t padded = ceil_div(a.k, kBlockInputs) * kBlockInputs;
  for (int64_t i = a.k; i < padded; ++i) order[i] = static_cast<uint8_t>(i % kBlockInputs);
}

// Moves the values of one row's block of 64 inputs: kept channel j goes to place[j].
template <class Value>
void move_values(const uint8_t* place, uint64_t& mask, Value* values) {
  Value dense[kBlockInputs];
  uint64_t moved = 0;
  const Value* source = values;
  for (uint64_t rest = mask; rest != 0; rest &= rest - 1) {
    const int to = place[__builtin_ctzll(rest)];
    dense[to] = *source++;
    moved |= uint64_t{1} << to;
  }
  Value* target = values;
  for (uint64_t rest = moved; rest != 0; rest &= rest - 1) {
    *target++ = dense[__builtin_ctzll(rest)];
  }
  mask = moved;
}

// The same in 12 bits. Strays go to `strays`, which moves on.
template <class AnyBlock>
void write_in_twelve_bits(const Packing& packing, int64_t group, AnyBlock& block, int row,
                          uint64_t mask, const bf16* values, int64_t first_input, Stray*& strays) {
  using Traits = BlockTraits<AnyBlock>;
  const uint8_t largest = packing.largest[group * Traits::kRows + row];
  for (int i = 0; i < kBlockValues; ++i, mask &= mask - 1) {
    bf16 value = values[i];
    if (is_stray(value, largest)) {
      const int place = __builtin_ctzll(mask);
      const int input = Traits::kInterleaved ? uninterleaved<Traits::kRows>(place) : place;
      *strays++ = {static_cast<uint32_t>(first_input + input), static_cast<uint16_t>(row), value};
      value = 0;
    }
    write_value(block, row, i, value, largest);
  }
}

// What a row group has behind the blocks, null where there is none.
struct GroupTables {
  int32_t* sums;
  uint8_t* multipliers;
  Stray* strays;
};

// Where those of row groups stand.
class Tables {
 public:
  Tables(const Packing& packing, char* behind)
      : packing_(packing), rows_(packing.layout.rows()), behind_(behind) {
    if (in_twelve_bits(packing.layout.type)) strays_ = write_tables(packing, behind);
  }

  GroupTables of(int64_t group) const {
    const PackedLayout& layout = packing_.layout;
    GroupTables own{};
    if (in_int8(layout.type)) own.sums = reinterpret_cast<int32_t*>(behind_) + group * rows_;
    if (has_multipliers_behind(layout.type)) {
      own.multipliers = reinterpret_cast<uint8_t*>(behind_) + layout.multipliers_place() +
                        group * ceil_div(layout.k, kBlockInputs) * rows_;
    }
    if (strays_ != nullptr) own.strays = strays_ + packing_.first_stray[group];
    return own;
  }

 private:
  const Packing& packing_;
  const int64_t rows_;
  char* const behind_;
  Stray* strays_ = nullptr;
};

template <class AnyBlock>
BadMask pack_row_group(const Packing& packing, const PackArguments& a, int64_t group,
                       AnyBlock* blocks, GroupTables tables) {
  using Traits = BlockTraits<AnyBlock>;
  using Value = typename Traits::Value;
  using Source = SourceOf<Value>;
  constexpr int Rows = Traits::kRows;
  constexpr bool kInterleaved = Traits::kInterleaved;
  const bool undoes = a.permutation != nullptr && !in_groups(packing.layout.type);
  const bool moves = undoes || kInterleaved;
  BadMask bad;
  const int64_t input_blocks = ceil_div(a.k, kBlockInputs);
  for (int64_t b = 0; b < input_blocks; ++b) {
    const int64_t first = b * kBlockInputs;
    const int64_t inputs = std::min<int64_t>(kBlockInputs, a.k - first);
    uint8_t place[kBlockInputs];
    for (int64_t j = 0; moves && j < kBlockInputs; ++j) {
      const int64_t to = undoes && j < inputs ? unpermuted(a, first, j) : j;
      place[j] = static_cast<uint8_t>(kInterleaved ? interleaved<Rows>(static_cast<int>(to)) : to);
    }
    AnyBlock& block = blocks[b];
    std::memset(static_cast<void*>(&block), 0, sizeof(block));
    for (int r = 0; r < Rows; ++r) {
      const int64_t row = group * Rows + r;
      if (row >= a.n) {
        write_mask(block, r, kPaddingMask);
        continue;
      }
      uint64_t mask = load_mask(a.mask + row * (a.k / 8) + first / 8, inputs);
      const BadMask wrong = check(a, mask, row, first, inputs);
      if (wrong.row >= 0) {
        if (bad.row < 0) bad = wrong;
        continue;
      }
      // The values of absent inputs come last and are zero.
      if (inputs < kBlockInputs) mask |= kPaddingMask << inputs;
      Source values[kBlockValues] = {};
      const Source* source = static_cast<const Source*>(a.values) + row * (a.k / 2) + first / 2;
      std::memcpy(values, source, inputs / 2 * sizeof(Source));
      if (moves) move_values(place, mask, values);
      write_mask(block, r, mask);
      if constexpr (std::is_same_v<Source, int8_t>) {
        tables.sums[r] += std::accumulate(values, values + kBlockValues, int32_t{0});
      }
      if constexpr (std::is_same_v<Value, bf12>) {
        write_in_twelve_bits(packing, group, block, r, mask, values, first, tables.strays);
      } else if constexpr (std::is_same_v<Value, int4>) {
        const uint8_t multiplier = multiplier_of(values, kBlockValues);
        if (tables.multipliers != nullptr) tables.multipliers[b * Rows + r] = multiplier;
        write_values(block, r, values, multiplier);
      } else {
        write_values(block, r, values);
      }
    }
  }
  return bad;
}

template <class AnyBlock>
BadMask pack_rows(const Packing& packing, const PackArguments& a, void* packed) {
  constexpr int Rows = BlockTraits<AnyBlock>::kRows;
  const PackedLayout& layout = packing.layout;
  const int64_t input_blocks = ceil_div(a.k, kBlockInputs);
  const int64_t groups = ceil_div(a.n, Rows);
  auto* blocks = static_cast<AnyBlock*>(packed);
  auto* behind = static_cast<char*>(packed) + layout.block_bytes();
  std::memset(behind, 0, layout.bytes() - layout.block_bytes());
  const Tables tables(packing, behind);
  if (in_groups(layout.type))
    write_order(a, reinterpret_cast<uint8_t*>(behind + layout.order_place()));
  BadMask first_bad;
  std::mutex guard;
  constexpr int64_t kTogether = BlockTraits<AnyBlock>::kTogether;
  parallel_for(ceil_div(groups, kTogether), [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * kTogether, groups);
    for (int64_t group = begin * kTogether; group < last; ++group) {
      auto* own = blocks + group * input_blocks;
      const BadMask bad = pack_row_group(packing, a, group, own, tables.of(group));
      if (bad.row < 0) continue;
      const std::lock_guard<std::mutex> lock(guard);
      if (first_bad.row < 0 || bad.row < first_bad.row) first_bad = bad;
    }
  });
  return first_bad;
}

template <class Value>
BadMask pack_values(const Packing& packing, const PackArguments& a, void* packed) {
  static_assert(kPortableRows == kAvx512Rows);
  const ValueType type = packing.layout.type;
  if constexpr (!std::is_same_v<Value, bf12>) {
    if (of_four(type)) return pack_rows<LaneBlock<Value, 4>>(packing, a, packed);
    if (in_lanes(type)) return pack_rows<LaneBlock<Value, 16>>(packing, a, packed);
  }
  if constexpr (!std::is_same_v<Value, bf16>) {
    if (in_groups(type)) return pack_rows<GroupedBlock<Value>>(packing, a, packed);
  }
  if constexpr (!std::is_same_v<Value, bf12>) {
    if (packing.layout.rows() != kAmxRows) {
      return pack_rows<Block<kAvx512Rows, Value>>(packing, a, packed);
    }
  }
  return pack_rows<Block<kAmxRows, Value>>(packing, a, packed);
}

// Of one row of a block.
int64_t row_bytes(ValueType type) {
  constexpr int64_t kMask = sizeof(uint64_t);
  switch (type) {
    case ValueType::kBfloat16:
      return kMask + kBlockValues * 2;
    case ValueType::kBfloat12:
    case ValueType::kGroupedBfloat12:
      return kMask + kBlockValues * 3 / 2;
    case ValueType::kInt8:
    case ValueType::kGroupedInt8:
      return kMask + kBlockValues;
    case ValueType::kBfloat16Of4:
      return sizeof(LaneBlock<bf16, 4>) / kPortableRows;
    case ValueType::kBfloat16Of16:
      return sizeof(LaneBlock<bf16, 16>) / kPortableRows;
    case ValueType::kInt8Of4:
      return sizeof(LaneBlock<int8_t, 4>) / kPortableRows;
    case ValueType::kInt8Of16:
      return sizeof(LaneBlock<int8_t, 16>) / kPortableRows;
    case ValueType::kInt4Of4:
      return sizeof(LaneBlock<int4, 4>) / kPortableRows;
    case ValueType::kInt4Of16:
      return sizeof(LaneBlock<int4, 16>) / kPortableRows;
    case ValueType::kInt4:
    case ValueType::kGroupedInt4:
      return kMask + kBlockValues / 2 + sizeof(uint8_t);
    case ValueType::kDense12:
      return kBlockInputs * 3 / 2;
    case ValueType::kDense8:
      return kBlockInputs;
  }
  return 0;
}

}  // namespace

int64_t PackedLayout::row_groups() const { return ceil_div(n, rows()); }

int64_t PackedLayout::most_strays() const {
  return n * (is_dense(type) ? k : k / 2) / kValuesOfStray;
}

int64_t PackedLayout::block_bytes() const {
  return row_groups() * ceil_div(k, kBlockInputs) * rows() * row_bytes(type);
}

int64_t PackedLayout::multipliers_place() const { return row_groups() * rows() * sizeof(int32_t); }

int64_t PackedLayout::order_place() const {
  const int64_t padded_rows = row_groups() * rows();
  if (has_multipliers_behind(type))
    return multipliers_place() + padded_rows * ceil_div(k, kBlockInputs);
  if (in_int8(type)) return padded_rows * sizeof(int32_t);
  if (!in_twelve_bits(type)) return 0;
  return padded_rows + (row_groups() + 1) * sizeof(int32_t) + most_strays() * sizeof(Stray);
}

int64_t PackedLayout::bytes() const {
  int64_t behind = order_place();
  if (in_groups(type)) behind += ceil_div(k, kBlockInputs) * kBlockInputs;
  return block_bytes() + ceil_div(behind, kLineBytes) * kLineBytes + kTailBytes;
}

BehindBlocks PackedLayout::behind(const void* packed) const {
  const char* start = static_cast<const char*>(packed) + block_bytes();
  BehindBlocks found;
  if (in_int8(type)) found.value_sums = reinterpret_cast<const int32_t*>(start);
  if (has_multipliers_behind(type)) {
    found.multipliers = reinterpret_cast<const uint8_t*>(start + multipliers_place());
  }
  if (in_twelve_bits(type)) {
    found.largest = reinterpret_cast<const uint8_t*>(start);
    found.first_stray = reinterpret_cast<const int32_t*>(start + row_groups() * rows());
    found.strays = reinterpret_cast<const Stray*>(found.first_stray + row_groups() + 1);
    found.stray_count = strays;
  }
  if (in_groups(type)) found.order = reinterpret_cast<const uint8_t*>(start + order_place());
  return found;
}

Packing choose_packing(Isa isa, const PackArguments& a) {
  // The kernel of avx512_vnni counts in groups, that of avx512 in all of a block.
  if (isa == Isa::kAvx512Vnni && a.group > kGroupInputs) isa = Isa::kAvx512;
  if (has_lanes(isa)) return {{isa, lanes_of(a), a.n, a.k}, {}, {}};
  const bool groups = has_groups(isa) && keeps_eight_of_sixteen(a);
  if (in_int8(a.type)) {
    ValueType type = groups ? ValueType::kGroupedInt8 : ValueType::kInt8;
    if (has_kernel(isa, ValueType::kInt4) && takes_four_bits(a)) {
      type = groups ? ValueType::kGroupedInt4 : ValueType::kInt4;
    }
    return {{isa, type, a.n, a.k}, {}, {}};
  }
  const ValueType type = groups ? ValueType::kGroupedBfloat12 : ValueType::kBfloat12;
  if (!has_kernel(isa, type)) return {{isa, a.type, a.n, a.k}, {}, {}};
  const PackedLayout layout{isa, type, a.n, a.k};
  return find_strays(layout, static_cast<const bf16*>(a.values), a.k / 2);
}

BadMask pack(const Packing& packing, const PackArguments& arguments, void* packed) {
  const ValueType type = packing.layout.type;
  if (in_four_bits(type)) return pack_values<int4>(packing, arguments, packed);
  if (in_int8(type)) return pack_values<int8_t>(packing, arguments, packed);
  if (in_twelve_bits(type)) return pack_values<bf12>(packing, arguments, packed);
  return pack_values<bf16>(packing, arguments, packed);
}

}  // namespace permllm::cpu
