// From the rows of the output head to packed blocks (layout.h).
#include <algorithm>
#include <cstring>

#include "linear.h"
#include "pack.h"
#include "threads.h"
#include "twelve_bits.h"

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
        blocks->lower[r][interleaved(i)] = static_cast<uint8_t>(value);
        write_code(blocks->upper, r, interleaved(i), upper_code(value, largest));
      }
    }
  }
}

}  // namespace

Packing choose_dense_packing(Isa isa, const bf16* rows, int64_t n, int64_t k) {
  if (!has_kernel(isa, ValueType::kDense12)) return {{isa, ValueType::kBfloat16, n, k}, {}, {}};
  return find_strays({isa, ValueType::kDense12, n, k}, rows, k);
}

void pack_dense(const Packing& packing, const bf16* rows, void* packed) {
  const PackedLayout& layout = packing.layout;
  const int64_t input_blocks = ceil_div(layout.k, kBlockInputs);
  auto* blocks = static_cast<Block<kAvx512Rows, dense12>*>(packed);
  char* behind = static_cast<char*>(packed) + layout.block_bytes();
  std::memset(behind, 0, layout.bytes() - layout.block_bytes());
  Stray* strays = write_tables(packing, behind);
  parallel_for(ceil_div(layout.n, kAvx512Rows), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      pack_group(packing, rows, group, blocks + group * input_blocks,
                 strays + packing.first_stray[group]);
    }
  });
}

}  // namespace permllm::cpu
