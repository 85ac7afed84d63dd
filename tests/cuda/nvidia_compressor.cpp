// NVIDIA's own compressor for sparse operands of sm_90, its device code run on the CPU:
// one operating system thread per CUDA thread.
#include <cuda_runtime_api.h>
#include <pthread.h>

#include <cassert>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

// The names of the CUDA language that the device code uses.
struct Index {
  unsigned x, y, z;
};
static thread_local Index threadIdx, blockIdx;
static Index gridDim, blockDim;
static pthread_barrier_t block_barrier;
inline void __syncthreads() { pthread_barrier_wait(&block_barrier); }

// The order of these matters: cute before the configurations, which include too little.
// clang-format off
#include "cutlass/cutlass.h"
#include "cute/tensor.hpp"
#include "cutlass/gemm/collective/builders/sm90_sparse_config.inl"
#include "cutlass/transform/kernel/sparse_gemm_compressor.hpp"
// clang-format on

namespace {

using Problem = cute::Shape<int, int, int, int>;
using RowMajor = cutlass::layout::RowMajor;

// How the GEMMs of sm_90 want their operands.
template <class T>
using Config = cutlass::Sm90GemmSparseConfig<cute::sparse_elem<2, T>, cute::GMMA::Major::K,
                                             cute::sparse_elem<8, uint8_t>, cute::Int<128>>;

// Compresses dense [rows][inputs]. `values` and `metadata` are zeroed and large enough.
template <class T>
void compress(const void* dense, int rows, int inputs, void* values, uint8_t* metadata) {
  using Compressor =
      cutlass::transform::kernel::StructuredSparseCompressor<Problem, T, RowMajor, Config<T>,
                                                             cutlass::arch::Sm90>;
  const Problem problem{rows, 1, inputs, 1};
  const cute::Stride<int64_t, cute::Int<1>, int64_t> stride{inputs, {}, 0};
  const typename Compressor::Params params{
      problem,
      {static_cast<T*>(const_cast<void*>(dense)), stride, static_cast<T*>(values), metadata},
      {},
      nullptr};
  const auto grid = Compressor::get_grid_shape(params);
  const auto block = Compressor::get_block_shape();
  gridDim = {grid.x, grid.y, grid.z};
  blockDim = {block.x, block.y, block.z};
  std::vector<char> storage(Compressor::SharedStorageSize + 128);
  auto* shared =
      reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(storage.data()) + 127) / 128 * 128);
  pthread_barrier_init(&block_barrier, nullptr, block.x);
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < block.x; ++thread) {
    threads.emplace_back([&, thread] {
      threadIdx = {thread, 0, 0};
      Compressor compressor;
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = {x, y, 0};
          compressor(params, shared);
          __syncthreads();
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
  pthread_barrier_destroy(&block_barrier);
}

}  // namespace

extern "C" {

#define COMPRESS(name, T)                                                                          \
  void compress_##name(const void* dense, int rows, int inputs, void* values, uint8_t* metadata) { \
    compress<T>(dense, rows, inputs, values, metadata);                                            \
  }

COMPRESS(bfloat16, cutlass::bfloat16_t)
COMPRESS(float16, cutlass::half_t)

// Where CUTLASS' layout of the operand E puts the metadata of (row, input), in bytes.
int64_t metadata_byte(int row, int input, int rows, int inputs) {
  const auto layout = Config<cutlass::bfloat16_t>::fill_layoutE(Problem{rows, 1, inputs, 1});
  return layout(cute::make_coord(row, input, 0)) / 8;
}
}
