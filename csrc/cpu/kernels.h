// The kernels: y[m, n] = x[m, k] @ W[n, k]^T + bias, W packed as layout.h says.
//
// Accumulation is in float32; y is rounded once, to nearest even, after the bias is added. Kernels
// for int8 values round x to integers with one scale per token, the largest magnitude of the token
// becoming 32767 (W8A16) or 127 (W8A8); their products are summed exactly, in int32.
//
// A kernel runs one parallel region for every 256 tokens (1024 on AMX), in which x is packed, and
// then row groups are multiplied.
#pragma once

#include "layout.h"

namespace permllm::cpu {

// `Real` is the type of what goes in and out: bf16, fp16 or float.
template <class Real>
struct LinearOf {
  const Real* x;  // [m, k], rows x_stride elements apart
  int64_t x_stride;
  int64_t m;           // >= 1
  const void* packed;  // blocks, 64-byte aligned
  int64_t n;           // logical rows; row groups are ceil(n / Rows)
  int64_t k;           // logical inputs; input blocks are ceil(k / 64)
  const Real* bias;    // [n] or null
  Real* y;             // [m, n] contiguous

  // For int8 values, else null.
  const float* scale = nullptr;         // [n]
  const int32_t* value_sums = nullptr;  // [row groups * Rows], in `packed`
};

using LinearArguments = LinearOf<bf16>;

void amx_few_tokens(const LinearArguments&);         // m <= AmxTuning::kFewTokens
void amx_many_tokens(const LinearArguments&);        // any m
void avx512_few_tokens(const LinearArguments&);      // m <= Avx512Bf16Tuning::kFewTokens
void avx512_several_tokens(const LinearArguments&);  // m <= Avx512Bf16Tuning::kSeveralTokens
void avx512_many_tokens(const LinearArguments&);     // any m

void amx_int8_few_tokens(const LinearArguments&);   // m <= AmxTuning::kSplitTokens, W8A16
void amx_int8_many_tokens(const LinearArguments&);  // any m, W8A8

// As those of bfloat16: W8A16 for m <= 2, and W8A8.
void avx512_int8_few_tokens(const LinearArguments&);
void avx512_int8_several_tokens(const LinearArguments&);
void avx512_int8_many_tokens(const LinearArguments&);

// Any m, values of both types, x of every type: products with x as it is.
void avx512_float32(const LinearOf<bf16>&);
void avx512_float32(const LinearOf<fp16>&);
void avx512_float32(const LinearOf<float>&);
void avx2_float32(const LinearOf<bf16>&);
void avx2_float32(const LinearOf<fp16>&);
void avx2_float32(const LinearOf<float>&);
void portable(const LinearOf<bf16>&);
void portable(const LinearOf<fp16>&);
void portable(const LinearOf<float>&);

}  // namespace permllm::cpu
