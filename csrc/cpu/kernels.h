// The kernels: y[m, n] = x[m, k] @ W[n, k]^T + bias, W packed as layout.h says.
//
// Accumulation is in float32; y is rounded once, to nearest even, after the bias is added. Where
// products of int8 values are of integers, x is rounded to integers with one scale per token, the
// largest magnitude of the token becoming 32767 (W8A16), 8191 (W8A14, on avx2) or 127 (W8A8), and
// less where sums have no room for that; these products are summed exactly, in int32. Where they
// are of float32 (portable, and avx512 but for dense rows), x stays as it is. How float16 meets
// bfloat16 values without float32 products is told in words.h.
//
// The instructions that multiply and round bfloat16 take numbers below 2^-126 as zero: those of x,
// W, bias and y on amx (with int8 values those of bias and y), and with bfloat16 values on
// avx512_bf16 and zen5. All other kernels keep them. Where x becomes integers, a token whose
// largest magnitude is below 2^-100 is zero.
//
// The workers of one parallel region run a kernel together (region.h): for every kPackedTokens of
// its tokens, at most, they pack x, and then multiply row groups.
#pragma once

#include "cpu/packing/layout.h"
#include "cpu/threads/team.h"

namespace permllm::cpu {

// What stands behind the blocks of a packed weight.
struct BehindBlocks {
  const int32_t* value_sums = nullptr;  // [row groups * Rows], of int8 values

  // Of int8 values in 4 bits in lanes.
  const uint8_t* multipliers = nullptr;  // [row groups][blocks][Rows]

  // Of bfloat16 values in 12 bits.
  const uint8_t* largest = nullptr;      // [row groups * Rows]
  const int32_t* first_stray = nullptr;  // [row groups + 1]
  const Stray* strays = nullptr;
  int64_t stray_count = 0;  // of the header, whatever stands in `first_stray`

  const uint8_t* order = nullptr;  // [padded inputs], or null where blocks have the order of x
};

// `Real` is the type of what goes in and out: bf16, fp16 or float.
template <class Real>
struct LinearOf {
  const Real* x;  // [m, k], rows x_stride elements apart
  int64_t x_stride;
  int64_t m;           // >= 1
  const void* packed;  // blocks, or the rows of a dense weight, 64-byte aligned
  int64_t n;           // logical rows; row groups are ceil(n / Rows)
  int64_t k;           // logical inputs; input blocks are ceil(k / 64)
  const Real* bias;    // [n] or null
  Real* y;             // [m, n] contiguous

  const float* scale = nullptr;  // [n], for int8 values
  BehindBlocks behind = {};      // in `packed`

  // What the workers share, 64-byte aligned, for up to kPackedTokens tokens.
  void* packed_x = nullptr;       // tokens and inputs in an order of the kernel's, each padded to a
                                  // multiple of 16 and of 64
  float* token_scales = nullptr;  // two for each of the padded tokens

  // Of bf16 kernels alone.
  bool half = false;  // x, bias and y hold float16 in their 16 bits
  int parts = 1;      // rows of x that a token is: two where few float16 meet bfloat16 values. m
                      // counts them, x holds a token once

  bool last = true;  // no other tokens of the call follow

  int64_t token(int64_t row) const { return parts == 2 ? row / 2 : row; }
};

using LinearArguments = LinearOf<bf16>;

// Tokens first..first+count-1 of a call, or of some of its tokens; whole ones.
template <class Real>
static LinearOf<Real> part_of(const LinearOf<Real>& a, int64_t first, int64_t count) {
  LinearOf<Real> part = a;
  part.x += a.token(first) * a.x_stride;
  part.y += a.token(first) * a.n;
  part.m = count;
  part.last = a.last && first + count == a.m;
  return part;
}

// `Value` is bf16, bf12 or dense12.
template <class Value>
void amx_few_tokens(const LinearArguments&, Worker&);  // m <= AmxTuning::kFewTokens
template <class Value>
void amx_many_tokens(const LinearArguments&, Worker&);  // any m

void amx_dense(const LinearArguments&, Worker&);  // as dense.h says

// `Value` is int8_t, int4 or dense8.
template <class Value>
void amx_int8_few_tokens(const LinearArguments&, Worker&);  // m <= AmxTuning::kSplitTokens, W8A16
template <class Value>
void amx_int8_several_tokens(const LinearArguments&, Worker&);  // m <= kFewTokens, W8A8
template <class Value>
void amx_int8_many_tokens(const LinearArguments&, Worker&);  // any m, W8A8

// With the constants of Avx512Bf16Tuning or Zen5Tuning; `Value` is bf16 or dense12.
template <class Tuning, class Value, int Most>
void avx512_few_tokens(const LinearArguments&, Worker&);  // m <= Most
template <class Tuning, class Value>
void avx512_several_tokens(const LinearArguments&, Worker&);  // m <= kSeveralTokens
template <class Tuning, class Value>
void avx512_many_tokens(const LinearArguments&, Worker&);  // any m
template <class Tuning>
void avx512_dense(const LinearArguments&, Worker&);  // as dense.h says

// As those of bfloat16: W8A16 for m <= kSplitTokens, and W8A8. `Value` is dense8, int8_t or int4.
template <class Tuning, class Value, int Most>
void avx512_int8_few_tokens(const LinearArguments&, Worker&);  // m <= Most
template <class Tuning, class Value>
void avx512_int8_several_tokens(const LinearArguments&, Worker&);
template <class Tuning, class Value>
void avx512_int8_many_tokens(const LinearArguments&, Worker&);

// Sparse rows in groups (layout.h): bfloat16 values in 12 bits, or `Value` is int8_t or int4.
template <class Tuning>
void avx512_kept_few_tokens(const LinearArguments&, Worker&);  // m <= kKeptFewTokens
template <class Tuning>
void avx512_kept_many_tokens(const LinearArguments&, Worker&);  // any m
template <class Tuning, class Value>
void avx512_int8_kept_few_tokens(const LinearArguments&, Worker&);  // m <= kKeptFewTokensInt8:
                                                                    // W8A16 for <= kSplitTokens
template <class Tuning, class Value>
void avx512_int8_kept_many_tokens(const LinearArguments&, Worker&);  // any m, W8A8

// Any m, values of both types, x of every type: products with x as it is. avx2_float32 is of values
// in lanes (layout.h), of bf16, int8_t or int4, and `Of` is 4 where two of every four are kept,
// else 16.
void avx512_float32(const LinearOf<bf16>&, Worker&);
void avx512_float32(const LinearOf<fp16>&, Worker&);
void avx512_float32(const LinearOf<float>&, Worker&);
template <class Value, int Of, class Real>
void avx2_float32(const LinearOf<Real>&, Worker&);
void avx2_masks(const LinearOf<bf16>&, Worker&);
void avx2_masks(const LinearOf<fp16>&, Worker&);
void avx2_masks(const LinearOf<float>&, Worker&);
void portable(const LinearOf<bf16>&, Worker&);
void portable(const LinearOf<fp16>&, Worker&);
void portable(const LinearOf<float>&, Worker&);

// Any m, x of 16 bits: W8A16 for m <= kSplitTokens or, of values in lanes, kLaneSplitTokens, and
// W8A8; without VNNI W8A14 in place of W8A16, and up to 16 bits of dense rows.
template <class Value, class Real>
void avx512_vnni(const LinearOf<Real>&, Worker&);  // int8_t or dense8
template <class Value, int Of, class Real>
void avx2_vnni_int8(const LinearOf<Real>&, Worker&);
template <class Real>
void avx2_vnni_dense8(const LinearOf<Real>&, Worker&);
template <class Value, int Of, class Real>
void avx2_int8(const LinearOf<Real>&, Worker&);
template <class Real>
void avx2_dense8(const LinearOf<Real>&, Worker&);

// As dense.h says, any m; n is a multiple of kPortableRows, k of kBlockInputs.
void avx2_dense(const LinearArguments&, Worker&);

}  // namespace permllm::cpu
