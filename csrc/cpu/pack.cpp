#include "pack.h"

#include <algorithm>
#include <cstring>
#include <mutex>

#include "threads.h"

namespace permllm::cpu {
namespace {

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

// Undoes the permutation of one row's block of 64 inputs: kept channel j goes to place[j].
template <class Value>
void unpermute(const uint8_t* place, uint64_t& mask, Value* values) {
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

template <int Rows, class Value>
BadMask pack_row_group(const PackArguments& a, int64_t group, Block<Rows, Value>* blocks) {
  BadMask bad;
  const int64_t input_blocks = ceil_div(a.k, kBlockInputs);
  for (int64_t b = 0; b < input_blocks; ++b) {
    const int64_t first = b * kBlockInputs;
    const int64_t inputs = std::min<int64_t>(kBlockInputs, a.k - first);
    uint8_t place[kBlockInputs];
    if (a.permutation != nullptr) {
      for (int64_t j = 0; j < inputs; ++j) {
        place[j] = static_cast<uint8_t>(j / a.block_size * a.block_size + a.permutation[first + j]);
      }
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
      Value* values = block.values[r];
      const Value* source = static_cast<const Value*>(a.values) + row * (a.k / 2) + first / 2;
      std::memcpy(values, source, inputs / 2 * sizeof(Value));
      if (a.permutation != nullptr) unpermute(place, mask, values);
      // The values of absent inputs come last and are zero.
      block.mask[r] = inputs == kBlockInputs ? mask : mask | kPaddingMask << inputs;
    }
  }
  return bad;
}

// The sums of this many rows, in whole cache lines.
int64_t sum_count(int64_t rows) { return ceil_div(rows, 16) * 16; }

// What kernels need beside the blocks: nothing for bfloat16.
template <int Rows>
void sum_values(const Block<Rows, bf16>*, int64_t, int32_t*) {}

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
BadMask pack_rows(const PackArguments& a, void* packed) {
  const int64_t input_blocks = ceil_div(a.k, kBlockInputs);
  const int64_t groups = ceil_div(a.n, Rows);
  auto* blocks = static_cast<Block<Rows, Value>*>(packed);
  auto* sums = reinterpret_cast<int32_t*>(blocks + groups * input_blocks);
  BadMask first_bad;
  std::mutex guard;
  constexpr int64_t kTogether = Rows == kAmxRows ? kAmxGroups : 1;
  parallel_for(ceil_div(groups, kTogether), [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * kTogether, groups);
    for (int64_t group = begin * kTogether; group < last; ++group) {
      auto* own = blocks + group * input_blocks;
      const BadMask bad = pack_row_group(a, group, own);
      sum_values(own, input_blocks, sums + group * Rows);
      if (bad.row < 0) continue;
      const std::lock_guard<std::mutex> lock(guard);
      if (first_bad.row < 0 || bad.row < first_bad.row) first_bad = bad;
    }
  });
  if (a.type == ValueType::kBfloat16) {
    std::memset(sums, 0, kTailBytes);
  } else {
    std::memset(sums + groups * Rows, 0,
                (sum_count(groups * Rows) - groups * Rows) * sizeof(int32_t) + kTailBytes);
  }
  return first_bad;
}

template <class Value>
BadMask pack_values(Isa isa, const PackArguments& a, void* packed) {
  static_assert(kPortableRows == kAvx512Rows);
  return rows(isa) == kAmxRows ? pack_rows<kAmxRows, Value>(a, packed)
                               : pack_rows<kAvx512Rows, Value>(a, packed);
}

}  // namespace

int64_t block_bytes(Isa isa, ValueType type, int64_t n, int64_t k) {
  const int64_t value = type == ValueType::kInt8 ? sizeof(int8_t) : sizeof(bf16);
  const int64_t row = sizeof(uint64_t) + kBlockValues * value;  // of one block
  return ceil_div(n, rows(isa)) * ceil_div(k, kBlockInputs) * rows(isa) * row;
}

int64_t packed_bytes(Isa isa, ValueType type, int64_t n, int64_t k) {
  const int64_t sums = type == ValueType::kInt8 ? sum_count(ceil_div(n, rows(isa)) * rows(isa)) : 0;
  return block_bytes(isa, type, n, k) + sums * sizeof(int32_t) + kTailBytes;
}

BadMask pack(Isa isa, const PackArguments& arguments, void* packed) {
  return arguments.type == ValueType::kInt8 ? pack_values<int8_t>(isa, arguments, packed)
                                            : pack_values<bf16>(isa, arguments, packed);
}

}  // namespace permllm::cpu
