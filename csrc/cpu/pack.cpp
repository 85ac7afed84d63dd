#include "pack.h"

#include <algorithm>
#include <cstring>
#include <mutex>

#include "threads.h"

namespace permllm::cpu {
namespace {

constexpr uint64_t kPaddingMask = 0xffffffff;  // 32 bits, wherever

uint64_t load_mask(const uint8_t* bytes, int64_t inputs) {
  uint64_t mask = 0;
  for (int64_t i = 0; i < inputs / 8; ++i) mask |= uint64_t{bytes[i]} << (8 * i);
  return mask;
}

// Undoes the permutation of one row's block of 64 inputs: kept channel j goes to place[j].
void unpermute(const uint8_t* place, uint64_t& mask, bf16* values) {
  bf16 dense[kBlockInputs];
  uint64_t moved = 0;
  const bf16* source = values;
  for (uint64_t rest = mask; rest != 0; rest &= rest - 1) {
    const int to = place[__builtin_ctzll(rest)];
    dense[to] = *source++;
    moved |= uint64_t{1} << to;
  }
  bf16* target = values;
  for (uint64_t rest = moved; rest != 0; rest &= rest - 1) {
    *target++ = dense[__builtin_ctzll(rest)];
  }
  mask = moved;
}

// Sets the mask bits of absent inputs until 32 are set; their values, which come last, are zero.
uint64_t fill(uint64_t mask) {
  for (int j = kBlockInputs - 1; __builtin_popcountll(mask) < kBlockValues; --j) {
    mask |= uint64_t{1} << j;
  }
  return mask;
}

template <int Rows>
BadMask pack_row_group(const PackArguments& a, int64_t group, Block<Rows>* blocks) {
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
    Block<Rows>& block = blocks[b];
    std::memset(&block, 0, sizeof(block));
    for (int r = 0; r < Rows; ++r) {
      const int64_t row = group * Rows + r;
      if (row >= a.n) {
        block.mask[r] = kPaddingMask;
        continue;
      }
      uint64_t mask = load_mask(a.mask + row * (a.k / 8) + first / 8, inputs);
      const int kept = __builtin_popcountll(mask);
      if (kept != inputs / 2) {
        if (bad.row < 0) bad = {row, b, kept};
        continue;
      }
      bf16* values = block.values[r];
      std::memcpy(values, a.values + row * (a.k / 2) + first / 2, inputs / 2 * sizeof(bf16));
      if (a.permutation != nullptr) unpermute(place, mask, values);
      block.mask[r] = inputs == kBlockInputs ? mask : fill(mask);
    }
  }
  return bad;
}

template <int Rows>
BadMask pack_rows(const PackArguments& a, void* packed) {
  const int64_t input_blocks = ceil_div(a.k, kBlockInputs);
  const int64_t groups = ceil_div(a.n, Rows);
  auto* blocks = static_cast<Block<Rows>*>(packed);
  BadMask first_bad;
  std::mutex guard;
  parallel_for(groups, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const BadMask bad = pack_row_group(a, group, blocks + group * input_blocks);
      if (bad.row < 0) continue;
      const std::lock_guard<std::mutex> lock(guard);
      if (first_bad.row < 0 || bad.row < first_bad.row) first_bad = bad;
    }
  });
  std::memset(static_cast<void*>(blocks + groups * input_blocks), 0, kTailBytes);
  return first_bad;
}

}  // namespace

int64_t packed_bytes(Isa isa, int64_t n, int64_t k) {
  const int64_t block = isa == Isa::kAmx ? sizeof(Block<kAmxRows>) : sizeof(Block<kAvx512Rows>);
  return ceil_div(n, rows(isa)) * ceil_div(k, kBlockInputs) * block + kTailBytes;
}

BadMask pack(Isa isa, const PackArguments& arguments, void* packed) {
  static_assert(kPortableRows == kAvx512Rows);
  return isa == Isa::kAmx ? pack_rows<kAmxRows>(arguments, packed)
                          : pack_rows<kAvx512Rows>(arguments, packed);
}

}  // namespace permllm::cpu
