// From the rows of the output head to packed blocks (layout.h).
#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu/linear.h"
#include "cpu/packing/four_bits.h"
#include "cpu/packing/pack.h"
#include "cpu/packing/twelve_bits.h"
#include "cpu/threads/threads.h"

namespace permllm::cpu {
namespace {

template <int Rows>
void pack_group(const Packing& packing, const bf16* rows, int64_t group,
                Block<Rows, dense12>* blocks, Stray* strays) {
  const int64_t n = packing.layout.n, k = packing.layout.k;
  for (int64_t first = 0; first < k; first += kBlockInputs, ++blocks) {
    std::memset(static_cast<void*>(blocks), 0, sizeof(*blocks));
    const int inputs = static_cast<int>(std::min<int64_t>(kBlockInputs, k - first));
    for (int r = 0; r < Rows && group * Rows + r < n; ++r) {
      const int64_t row = group * Rows + r;
      const uint8_t largest = packing.largest[row];
      for (int i = 0; i < inputs; ++i) {
        const bf16 value = rows[row * k + first + i];
        if (is_stray(value, largest)) {
          *strays++ = {static_cast<uint32_t>(first + i), static_cast<uint16_t>(r), value};
          continue;
        }
        blocks->lower[r][interleaved<Rows>(i)] = static_cast<uint8_t>(value);
        write_four_bits(blocks->upper, r, interleaved<Rows>(i), upper_code(value, largest));
      }
    }
  }
}

// `Together` row groups belong to one thread, as where they are multiplied.
template <int Rows, int64_t Together>
void pack_words(const Packing& packing, const bf16* rows, void* packed) {
  const PackedLayout& layout = packing.layout;
  const int64_t input_blocks = ceil_div(layout.k, kBlockInputs), groups = ceil_div(layout.n, Rows);
  auto* blocks = static_cast<Block<Rows, dense12>*>(packed);
  char* behind = static_cast<char*>(packed) + layout.block_bytes();
  std::memset(behind, 0, layout.bytes() - layout.block_bytes());
  Stray* strays = write_tables(packing, behind);
  parallel_for(ceil_div(groups, Together), [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * Together, groups);
    for (int64_t group = begin * Together; group < last; ++group) {
      pack_group(packing, rows, group, blocks + group * input_blocks,
                 strays + packing.first_stray[group]);
    }
  });
}

// The same, the inputs in their order.
template <int Rows, int64_t Together>
void pack_int8(const PackedLayout& layout, const int8_t* rows, void* packed) {
  const int64_t n = layout.n, k = layout.k;
  const int64_t input_blocks = ceil_div(k, kBlockInputs), groups = ceil_div(n, Rows);
  auto* blocks = static_cast<Block<Rows, dense8>*>(packed);
  char* behind = static_cast<char*>(packed) + layout.block_bytes();
  std::memset(behind, 0, layout.bytes() - layout.block_bytes());
  auto* sums = reinterpret_cast<int32_t*>(behind);
  parallel_for(ceil_div(groups, Together), [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * Together, groups);
    for (int64_t group = begin * Together; group < last; ++group) {
      auto* own = blocks + group * input_blocks;
      std::memset(static_cast<void*>(own), 0, input_blocks * sizeof(*own));
      for (int r = 0; r < Rows && group * Rows + r < n; ++r) {
        const int64_t row = group * Rows + r;
        const int8_t* values = rows + row * k;
        for (int64_t first = 0; first < k; first += kBlockInputs) {
          const auto inputs = static_cast<size_t>(std::min<int64_t>(kBlockInputs, k - first));
          std::memcpy(own[first / kBlockInputs].values[r], values + first, inputs);
        }
        sums[row] = std::accumulate(values, values + k, int32_t{0});
      }
    }
  });
}

}  // namespace

Packing choose_dense_packing(Isa isa, const bf16* rows, int64_t n, int64_t k) {
  if (!has_kernel(isa, ValueType::kDense12)) return {{isa, ValueType::kBfloat16, n, k}, {}, {}};
  return find_strays({isa, ValueType::kDense12, n, k}, rows, k);
}

void pack_dense(const Packing& packing, const bf16* rows, void* packed) {
  cpu::rows(packing.layout.isa) == kAmxRows
      ? pack_words<kAmxRows, kAmxGroups>(packing, rows, packed)
      : pack_words<kAvx512Rows, 1>(packing, rows, packed);
}

void pack_dense_int8(const PackedLayout& layout, const int8_t* rows, void* packed) {
  static_assert(kPortableRows == kAvx512Rows);
  cpu::rows(layout.isa) == kAmxRows ? pack_int8<kAmxRows, kAmxGroups>(layout, rows, packed)
                                    : pack_int8<kAvx512Rows, 1>(layout, rows, packed);
}

}  // namespace permllm::cpu
