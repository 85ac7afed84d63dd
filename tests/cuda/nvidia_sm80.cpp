// NVIDIA's host code for sm_80 sparse operands: metadata order, and decompression of row-major
// metadata.
#include <cuda_runtime_api.h>

#include <cstring>
#include <fstream>
#include <iostream>

#include "cutlass/cutlass.h"
#include "cutlass/layout/matrix.h"
#include "cutlass/tensor_ref.h"
#include "cutlass/util/host_reorder.h"
#include "cutlass/util/host_uncompress.h"

namespace {

using RowMajor = cutlass::layout::RowMajor;
using Interleaved = cutlass::layout::ColumnMajorInterleaved<2>;

// Words of `Word` hold the nibbles of 4 or 8 groups.
template <class Word>
void reorder(void* metadata, int rows, int inputs, void* reordered) {
  const int words = inputs / 4 / (sizeof(Word) * 2);
  cutlass::TensorRef<Word, RowMajor> from(static_cast<Word*>(metadata), RowMajor(words));
  cutlass::TensorRef<Word, Interleaved> to(static_cast<Word*>(reordered),
                                           Interleaved::packed({rows, words}));
  cutlass::reorder_meta(to, from, {rows, 8, words});
}

template <class T, class Word>
void uncompress(void* values, void* metadata, int rows, int inputs, void* dense) {
  const int words = inputs / 4 / (sizeof(Word) * 2);
  cutlass::uncompress(
      cutlass::TensorRef<T, RowMajor>(static_cast<T*>(dense), RowMajor(inputs)),
      cutlass::TensorRef<T, RowMajor>(static_cast<T*>(values), RowMajor(inputs / 2)),
      cutlass::TensorRef<Word, RowMajor>(static_cast<Word*>(metadata), RowMajor(words)), rows,
      inputs);
}

}  // namespace

extern "C" {
void reorder_16(void* metadata, int rows, int inputs, void* reordered) {
  reorder<uint16_t>(metadata, rows, inputs, reordered);
}
void uncompress_16(void* values, void* metadata, int rows, int inputs, void* dense) {
  uncompress<cutlass::bfloat16_t, uint16_t>(values, metadata, rows, inputs, dense);
}
void uncompress_8(void* values, void* metadata, int rows, int inputs, void* dense) {
  uncompress<int8_t, uint32_t>(values, metadata, rows, inputs, dense);
}
}
