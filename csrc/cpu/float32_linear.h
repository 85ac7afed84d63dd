// The choice between the float32 kernels. Include last.
#pragma once

#include "float32_few.h"
#include "float32_many.h"

namespace permllm::cpu {
namespace {

template <class Isa, class Value, int Tokens = Isa::Tuning::kFewTokens, class Real>
void float32_few(const LinearOf<Real>& a) {
  if (a.m == Tokens) {
    run_in_one_region(FewTokens<Isa, Value, Tokens, Real>(a));
  } else if constexpr (Tokens > 1) {
    float32_few<Isa, Value, Tokens - 1>(a);
  }
}

// y = x @ W^T + bias for any number of tokens; a scale says that the values are int8.
template <class Isa, class Real>
void float32_linear(const LinearOf<Real>& a) {
  const bool int8 = a.scale != nullptr;
  if (a.m <= Isa::Tuning::kFewTokens) {
    int8 ? float32_few<Isa, int8_t>(a) : float32_few<Isa, bf16>(a);
  } else {
    int8 ? float32_many<Isa, int8_t>(a) : float32_many<Isa, bf16>(a);
  }
}

}  // namespace
}  // namespace permllm::cpu
