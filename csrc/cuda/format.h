// Packed 2:4 weight of a sparse linear layer on NVIDIA GPUs: one format for every kernel.
//
// The weight has `rows` outputs and `inputs` inputs in permuted order. Rows are padded to 128 and
// inputs to 128, with values of zero and metadata of 0x44.
//
// packed    [padded rows][padded inputs / 2]: of every group of 4 inputs the two kept values,
//           ascending by input. 16-bit values are stored in this order. 8-bit values are stored, in
//           each run of 16 (32 inputs, 8 groups), in the order of groups 0 4 1 5 2 6 3 7: the four
//           bytes that ldmatrix gives to a lane are then the two pairs that mma.sp wants there.
// metadata  a nibble per group, first | second << 2, where first < second are the places of the
//           kept values in their group. Two groups of 4 consecutive inputs share a byte, the lower
//           inputs in the lower nibble. Bytes are in the order that CUTLASS gives the operand E of
//           sm_90 for 16-bit types (Sm90GemmSparseConfig with tiles of 128 inputs or more). The
//           byte of row m and input k is
//             (k%16)/8 + 2 ((m/8)%2) + 4 ((k/32)%4) + 16 (m%8) + 128 ((k/16)%2) + 256 ((m/16)%4)
//             + 1024 (m/64) + 16 padded_rows (k/128)
//           so that one lane's metadata for 32 rows x 128 inputs of mma.sp.m16n8k32 are 16
//           consecutive bytes (metadata_of_lane).
// permutation  uint8 [padded inputs] or null: x_permuted[j] = x[j - j % 128 + permutation[j]].
//              Permutation blocks of 32, 64 and 128 inputs are all written this way.
// scale     float32 [rows], for 8-bit values: weight = value * scale.
//
// CUTLASS itself pads rows to 64 for sm_90: a plane of 128 inputs of ours starts with the bytes of
// theirs.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PERMLLM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PERMLLM_HOST_DEVICE inline
#endif

namespace permllm::cuda {

constexpr int kRowMultiple = 128;
constexpr int kInputMultiple = 128;
constexpr int kPermutationBlock = 128;

PERMLLM_HOST_DEVICE constexpr int64_t round_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// Where the metadata of row `m` and of the 8 inputs from `k` on are.
PERMLLM_HOST_DEVICE constexpr int64_t metadata_byte(int64_t m, int64_t k, int64_t padded_rows) {
  return (k % 16) / 8 + 2 * ((m / 8) % 2) + 4 * ((k / 32) % 4) + 16 * (m % 8) +
         128 * ((k / 16) % 2) + 256 * ((m / 16) % 4) + 1024 * (m / 64) +
         16 * padded_rows * (k / 128);
}

// The first of the 16 bytes that `lane` feeds to mma.sp for rows `m`..`m + 31` (m % 32 == 0) and
// the 128 inputs from `k` on (k % 128 == 0). Word i holds inputs 32 i .. 32 i + 31. Lanes 0 and 1
// of every four hold rows 0..15 (sparsity selector 0), lanes 2 and 3 rows 16..31 (selector 1).
PERMLLM_HOST_DEVICE constexpr int64_t metadata_of_lane(int lane, int64_t m, int64_t k,
                                                       int64_t padded_rows) {
  const int quad = lane / 4;
  const int member = lane % 4;
  return metadata_byte(m + 16 * (member / 2) + quad, k + 16 * (member % 2), padded_rows);
}

}  // namespace permllm::cuda
