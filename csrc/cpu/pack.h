// From the checkpoint's tensors to packed blocks (layout.h).
#pragma once

#include "isa.h"
#include "layout.h"

namespace permllm::cpu {

struct PackArguments {
  const void* values;  // [n, k / 2]: kept values, permuted order
  ValueType type;
  const uint8_t* mask;  // [n, k / 8]: kept channels, permuted order, least significant bit first
  const uint8_t* permutation;  // [k] local to blocks of block_size <= 64, or null: nothing to undo.
                               // Only where undoes_permutation(isa)
  int64_t block_size;
  int64_t n;
  int64_t k;
};

// Bytes of the packed blocks alone: the sums of int8 values begin there.
int64_t block_bytes(Isa isa, ValueType type, int64_t n, int64_t k);

// Bytes of everything, the sums and the tail included.
int64_t packed_bytes(Isa isa, ValueType type, int64_t n, int64_t k);

// A row and the first of eight inputs, of which its mask does not keep four.
struct BadMask {
  int64_t row = -1;
  int64_t input = -1;
  int kept = 0;
};

// Writes packed_bytes(...) bytes to `packed` (64-byte aligned), in parallel, each row group
// by the thread that the kernels give it to. Returns the first bad mask of a row, with row < 0 if
// there is none; `packed` is safe to use only then.
BadMask pack(Isa isa, const PackArguments& arguments, void* packed);

}  // namespace permllm::cpu
