// y = x @ W^T for a dense W whose rows stand as in the checkpoint: the output head.
//
// Where oneDNN multiplies bfloat16, vLLM packs a copy of it, which a few tokens read at a half to
// three quarters of memory's rate. Where it does not, PyTorch takes as long for each token as for
// one.
#pragma once

#include <limits>

#include "cpu/threads/region.h"

namespace permllm::cpu {

constexpr int64_t kDenseInputs = 32;  // of a vector
constexpr int64_t kAnyTokens = std::numeric_limits<int64_t>::max();

struct DenseKernel {
  KernelOf<bf16> kernel;
  int64_t tokens = 0;  // at most, beyond others are faster; 0 where there is no kernel
  // Up to so many, and beyond `tokens`, a copy in 12 bits is faster, where there is one.
  int64_t copied_tokens = kAnyTokens;
};

// The kernel that serves here for a weight [n, k] of bfloat16 values, or with `half` of float16:
// on avx512_bf16 and zen5 for a few tokens of bfloat16 and any number of float16, on amx for
// bfloat16, on avx2 and avx2_vnni for any number of both, where n is a multiple of kPortableRows
// and k of kBlockInputs.
DenseKernel dense_kernel(int64_t n, int64_t k, bool half);

// Multiplies m <= kernel.tokens tokens with the weight that the kernel was asked for. `packed` are
// the rows, [n, k], 64-byte aligned, in the type of x; n is not 0, and k is a multiple of
// kDenseInputs.
void dense_linear(const DenseKernel& kernel, const LinearArguments& arguments);

}  // namespace permllm::cpu
