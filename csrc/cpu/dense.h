// y = x @ W^T for a dense W whose rows stand as in the checkpoint: the output head.
//
// Where oneDNN multiplies bfloat16, vLLM packs a copy of it, which a few tokens read at a half to
// three quarters of memory's rate.
#pragma once

#include "kernels.h"

namespace permllm::cpu {

constexpr int64_t kDenseInputs = 32;  // of a vector

// How many tokens a kernel multiplies at most with a weight [n, k] here, 0 where there is none.
// Beyond, others are faster. None are for float16 (`half`), of which PyTorch multiplies few
// products in a cycle, nor where the instruction set multiplies no bfloat16.
int64_t dense_tokens(int64_t n, int64_t k, bool half);

// Multiplies m <= dense_tokens(n, k, half) tokens. `packed` are the rows, [n, k], 64-byte aligned,
// in the type of x; n is not 0, and k is a multiple of kDenseInputs.
void dense_linear(const LinearArguments& arguments);

}  // namespace permllm::cpu
