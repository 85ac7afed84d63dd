// Root-mean-square norms of tokens, what stands between the linear layers of a decoder.
#pragma once

#include "cpu/packing/layout.h"

namespace permllm::cpu {

// y = x / rms * weight for every token, in float32, where rms^2 = mean(x^2) + epsilon. x / rms is
// rounded to the type of the weight before it is multiplied, and the product to that of y, as
// vLLM's operators are defined. With a residual, x + residual stands in the place of x, and its
// rounded sum in the place of the residual.
template <class Real, class Weight>
struct NormOf {
  const Real* x;         // [m, n]
  Real* residual;        // [m, n] or null
  const Weight* weight;  // [n] or null: ones
  Real* y;               // [m, n], may be x
  int64_t m;
  int64_t n;
  float epsilon;
};

// Whether there is a kernel for the instruction set that serves here: any with AVX2.
bool has_norm();

// Any number of tokens, on all threads where there are several; only where has_norm().
template <class Real, class Weight>
void norm(const NormOf<Real, Weight>& arguments);

// Tokens first..last-1. Wider vectors have nothing to gain: rows come from the caches.
template <class Real, class Weight>
void avx2_norm(const NormOf<Real, Weight>& arguments, int64_t first, int64_t last);

}  // namespace permllm::cpu
