#include "pack.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <type_traits>

#include "linear.h"
#include "threads.h"
#include "twelve_bits.h"

namespace permllm::cpu {
namespace {

constexpr int64_t kLineBytes = 64;

constexpr uint64_t kPaddingMask = 0x0f0f0f0f'0f0f0f0f;  // four of every eight

uint64_t load_mask(const uint8_t* bytes, int64_t inputs) {
  uint64_t mask = 0;
  for (int64_t i = 0; i < inputs / 8; ++i) mask |= uint64_t{bytes[i]} << (8 * i);
  return mask;
}

BadMask check(uint64_t mask, int64_t row, int64_t first, int64_t inputs) {
  for (int64_t i = 0; i < inputs; i += 8) {
    const int kept = __builtin_popcount(static_cast<uint8_t>(mask >> i));
    if (kept != 4) return {row, first + i, kept};
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

// A row of a block, its values ascending by place.
template <int Rows, class Value>
void write_row(const Packing&, int64_t, Block<Rows, Value>& block, int row, const Value* values,
               int64_t, Stray*&) {
  std::memcpy(block.values[row], values, sizeof(block.values[row]));
}

// Strays go to `strays`, which moves on.
template <int Rows>
void write_row(const Packing& packing, int64_t group, Block<Rows, bf12>& block, int row,
               const bf16* values, int64_t first_input, Stray*& strays) {
  const uint8_t largest = packing.largest[group * Rows + row];
  uint64_t rest = block.mask[row];
  for (int i = 0; i < kBlockValues; ++i, rest &= rest - 1) {
    bf16 value = values[i];
    if (is_stray(value, largest)) {
      const int64_t input = first_input + uninterleaved<Rows>(__builtin_ctzll(rest));
      *strays++ = {static_cast<uint32_t>(input), static_cast<uint16_t>(row), value};
      value = 0;
    }
    block.lower[row][i] = static_cast<uint8_t>(value);
    write_code(block.upper, row, i, upper_code(value, largest));
  }
}

template <int Rows, class Value>
BadMask pack_row_group(const Packing& packing, const PackArguments& a, int64_t group,
                       Block<Rows, Value>* blocks, Stray* strays) {
  constexpr bool kInterleaved = std::is_same_v<Value, bf12>;
  using Source = std::conditional_t<kInterleaved, bf16, Value>;
  const bool undoes = a.permutation != nullptr && !packing.layout.has_order();
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
    Block<Rows, Value>& block = blocks[b];
    std::memset(static_cast<void*>(&block), 0, sizeof(block));
    for (int r = 0; r < Rows; ++r) {
      const int64_t row = group * Rows + r;
      if (row >= a.n) {
        block.mask[r] = kPaddingMask;
        continue;
      }
      uint64_t mask = load_mask(a.mask + row * (a.k / 8) + first / 8, inputs);
      const BadMask wrong = check(mask, row, first, inputs);
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
      block.mask[r] = mask;
      write_row(packing, group, block, r, values, first, strays);
    }
  }
  return bad;
}

// What stands behind the blocks of a row group: nothing for bfloat16, and for the same in 12 bits
// what the packing has found.
template <int Rows, class Value>
void sum_values(const Block<Rows, Value>*, int64_t, int32_t*) {}

template <int Rows>
void sum_values(const Block<Rows, int8_t>* blocks, int64_t count, int32_t* sums) {
  for (int r = 0; r < Rows; ++r) {
    sums[r] = 0;
    for (int64_t b = 0; b < count; ++b) {
      for (const int8_t value : blocks[b].values[r]) sums[r] += value;
    }
  }
}

template <int Rows, class Value>
BadMask pack_rows(const Packing& packing, const PackArguments& a, void* packed) {
  const PackedLayout& layout = packing.layout;
  const int64_t input_blocks = ceil_div(a.k, kBlockInputs);
  const int64_t groups = ceil_div(a.n, Rows);
  auto* blocks = static_cast<Block<Rows, Value>*>(packed);
  auto* behind = static_cast<char*>(packed) + layout.block_bytes();
  std::memset(behind, 0, layout.bytes() - layout.block_bytes());
  auto* sums = reinterpret_cast<int32_t*>(behind);
  Stray* strays = std::is_same_v<Value, bf12> ? write_tables(packing, behind) : nullptr;
  if (layout.has_order()) write_order(a, reinterpret_cast<uint8_t*>(strays + layout.most_strays()));
  BadMask first_bad;
  std::mutex guard;
  constexpr int64_t kTogether = Rows == kAmxRows ? kAmxGroups : 1;
  parallel_for(ceil_div(groups, kTogether), [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * kTogether, groups);
    for (int64_t group = begin * kTogether; group < last; ++group) {
      auto* own = blocks + group * input_blocks;
      Stray* own_strays = strays == nullptr ? nullptr : strays + packing.first_stray[group];
      const BadMask bad = pack_row_group(packing, a, group, own, own_strays);
      sum_values(own, input_blocks, sums + group * Rows);
      if (bad.row < 0) continue;
      const std::lock_guard<std::mutex> lock(guard);
      if (first_bad.row < 0 || bad.row < first_bad.row) first_bad = bad;
    }
  });
  return first_bad;
}

// Of one row of a block.
int64_t row_bytes(ValueType type) {
  constexpr int64_t kMask = sizeof(uint64_t);
  switch (type) {
    case ValueType::kBfloat16:
      return kMask + kBlockValues * 2;
    case ValueType::kBfloat12:
      return kMask + kBlockValues * 3 / 2;
    case ValueType::kInt8:
      return kMask + kBlockValues;
    case ValueType::kDense12:
      return kBlockInputs * 3 / 2;
    case ValueType::kDense8:
      return kBlockInputs;
  }
  return 0;
}

}  // namespace

int64_t PackedLayout::row_groups() const { return ceil_div(n, rows(isa)); }

bool PackedLayout::has_order() const {
  return type == ValueType::kBfloat12 && rows(isa) == kAvx512Rows;
}

int64_t PackedLayout::most_strays() const {
  return n * (is_dense(type) ? k : k / 2) / kValuesOfStray;
}

int64_t PackedLayout::block_bytes() const {
  return row_groups() * ceil_div(k, kBlockInputs) * rows(isa) * row_bytes(type);
}

int64_t PackedLayout::bytes() const {
  const int64_t padded_rows = row_groups() * rows(isa);
  int64_t behind = 0;
  if (in_int8(type)) behind = padded_rows * sizeof(int32_t);
  if (in_twelve_bits(type)) {
    behind = padded_rows + (row_groups() + 1) * sizeof(int32_t) + most_strays() * sizeof(Stray);
  }
  if (has_order()) behind += ceil_div(k, kBlockInputs) * kBlockInputs;
  return block_bytes() + ceil_div(behind, kLineBytes) * kLineBytes + kTailBytes;
}

BehindBlocks PackedLayout::behind(const void* packed) const {
  const char* start = static_cast<const char*>(packed) + block_bytes();
  BehindBlocks found;
  if (in_int8(type)) found.value_sums = reinterpret_cast<const int32_t*>(start);
  if (in_twelve_bits(type)) {
    found.largest = reinterpret_cast<const uint8_t*>(start);
    found.first_stray = reinterpret_cast<const int32_t*>(start + row_groups() * rows(isa));
    found.strays = reinterpret_cast<const Stray*>(found.first_stray + row_groups() + 1);
    found.stray_count = strays;
  }
  if (has_order()) found.order = reinterpret_cast<const uint8_t*>(found.strays + most_strays());
  return found;
}

Packing choose_packing(Isa isa, const PackArguments& a) {
  if (a.type != ValueType::kBfloat16 || !has_kernel(isa, ValueType::kBfloat12)) {
    return {{isa, a.type, a.n, a.k}, {}, {}};
  }
  const PackedLayout layout{isa, ValueType::kBfloat12, a.n, a.k};
  return find_strays(layout, static_cast<const bf16*>(a.values), a.k / 2);
}

BadMask pack(const Packing& packing, const PackArguments& arguments, void* packed) {
  static_assert(kPortableRows == kAvx512Rows);
  const bool tiles = rows(packing.layout.isa) == kAmxRows;
  switch (packing.layout.type) {
    case ValueType::kInt8:
      return tiles ? pack_rows<kAmxRows, int8_t>(packing, arguments, packed)
                   : pack_rows<kAvx512Rows, int8_t>(packing, arguments, packed);
    case ValueType::kBfloat12:
      return tiles ? pack_rows<kAmxRows, bf12>(packing, arguments, packed)
                   : pack_rows<kAvx512Rows, bf12>(packing, arguments, packed);
    case ValueType::kBfloat16:
    case ValueType::kDense12:
    case ValueType::kDense8:
      break;
  }
  return tiles ? pack_rows<kAmxRows, bf16>(packing, arguments, packed)
               : pack_rows<kAvx512Rows, bf16>(packing, arguments, packed);
}

}  // namespace permllm::cpu
