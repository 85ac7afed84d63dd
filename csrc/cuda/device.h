// The machine instructions that the kernels are written in.
//
// Everything that a plain C++ compiler does not know is here, so that the kernels also compile for
// the host, where tests/cuda/emulator.h takes the place of the GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifdef __CUDACC__

#define PERMLLM_DEVICE __device__ __forceinline__
#define PERMLLM_UNROLL _Pragma("unroll")
#define PERMLLM_LOOP _Pragma("unroll 1")

namespace permllm::cuda {

PERMLLM_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts to copy 16 bytes to shared memory, zeros where not `valid`.
PERMLLM_DEVICE void copy_async_16(void* shared, const void* global, bool valid = true) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
      "l"(global), "r"(valid ? 16 : 0)
      : "memory");
}

PERMLLM_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's latest groups of copies are unfinished.
template <int kPending>
PERMLLM_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + j gives the address of row j of matrix i.
PERMLLM_DEVICE void load_matrices(uint32_t (&result)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(shared_address(row))
               : "memory");
}

// sum[16 x 8] += a[16 x 32, 2:4 sparse] * b[32 x 8].
#define PERMLLM_MULTIPLY(type)                                                                   \
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type       \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, " \
               "%12, %13;"                                                                       \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),    \
                 "r"(b[3]), "r"(metadata), "n"(kSelector))

template <int kSelector>
PERMLLM_DEVICE void multiply_bfloat16(float (&sum)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[4], uint32_t metadata) {
  PERMLLM_MULTIPLY("bf16");
}

template <int kSelector>
PERMLLM_DEVICE void multiply_float16(float (&sum)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[4], uint32_t metadata) {
  PERMLLM_MULTIPLY("f16");
}
#undef PERMLLM_MULTIPLY

// Bytes of `low` are 0..3 and bytes of `high` 4..7; nibble i of `selector` picks byte i.
PERMLLM_DEVICE uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// (word & mask) ^ bits, in one instruction where two constants would otherwise take two.
PERMLLM_DEVICE uint32_t and_xor(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

PERMLLM_DEVICE uint32_t multiply_add_bfloat16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

PERMLLM_DEVICE uint32_t add_float16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

PERMLLM_DEVICE void sync_block() { __syncthreads(); }
PERMLLM_DEVICE void sync_warp() { __syncwarp(); }

}  // namespace permllm::cuda

#else

#define PERMLLM_DEVICE inline
#define PERMLLM_UNROLL
#define PERMLLM_LOOP

#include "emulator.h"

#endif
