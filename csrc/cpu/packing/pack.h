// From the checkpoint's tensors to packed blocks (layout.h).
#pragma once

#include <vector>

#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace permllm::cpu {

struct PackArguments {
  const void* values;   // [n, k / 2]: kept values, permuted order
  ValueType type;       // of these: kBfloat16 or kInt8
  const uint8_t* mask;  // [n, k / 8]: kept channels, permuted order, least significant bit first
  const uint8_t* permutation;  // [k] local to blocks of block_size <= 64, or null: none.
                               // Only where undoes_permutation(isa)
  int64_t block_size;
  int64_t group;  // of inputs, at most 64, of which every row keeps half, in permuted order
  int64_t n;
  int64_t k;
};

// What decides how many bytes a packed weight has.
struct PackedLayout {
  Isa isa;
  ValueType type;  // of the blocks
  int64_t n;
  int64_t k;
  int64_t strays = 0;

  // With more of them, values are packed in 16 bits.
  int64_t most_strays() const;
  // Of the blocks alone.
  int64_t block_bytes() const;
  // Of everything, what stands behind the blocks and the tail included.
  int64_t bytes() const;
  // Where the kernels find what stands behind the blocks: all but the scale.
  BehindBlocks behind(const void* packed) const;
  // Of a row group.
  int64_t rows() const { return in_groups(type) ? kGroupedRows : cpu::rows(isa); }
  // Where the multipliers of values in 4 bits stand in lanes, and where the order does, in bytes
  // behind the blocks.
  int64_t multipliers_place() const;
  int64_t order_place() const;

 private:
  int64_t row_groups() const;
};

// How values are packed: in 12 bits where a kernel reads those and few values do not fit, in groups
// or lanes by which pattern the mask has, and in 4 bits where a kernel reads those and all int8
// values fit.
struct Packing {
  PackedLayout layout;
  // For values in 12 bits.
  std::vector<uint8_t> largest;
  std::vector<int32_t> first_stray;
};

Packing choose_packing(Isa isa, const PackArguments& arguments);

// The same of a dense weight `rows`, [n, k]: kDense12, or kBfloat16 where that is not to be had.
Packing choose_dense_packing(Isa isa, const bf16* rows, int64_t n, int64_t k);

// A row and a group of inputs, of which its mask does not keep half.
struct BadMask {
  int64_t row = -1;
  int64_t input = -1;  // the first
  int64_t inputs = 0;
  int kept = 0;
};

// Writes layout.bytes() bytes to `packed` (64-byte aligned), in parallel, each row group by the
// thread that the kernels give it to. Returns the first bad mask of a row, with row < 0 if there is
// none; `packed` is safe to use only then.
BadMask pack(const Packing& packing, const PackArguments& arguments, void* packed);

// The same of a dense weight, where choose_dense_packing found kDense12.
void pack_dense(const Packing& packing, const bf16* rows, void* packed);

// The same of a dense weight of int8 values `rows`, [n, k]; the layout is one of kDense8.
void pack_dense_int8(const PackedLayout& layout, const int8_t* rows, void* packed);

}  // namespace permllm::cpu
