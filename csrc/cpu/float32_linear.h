// The choice between the float32 kernels. Include last.
#pragma once

#include "float32_few.h"
#include "float32_many.h"

namespace permllm::cpu {
namespace {

template <class Isa, class Value, int Tokens = Isa::Tuning::kFewTokens, class Real>
void float32_few(const LinearOf<Real>& a, Worker& worker) {
  if (a.m == Tokens) {
    go_through(FewTokens<Isa, Value, Tokens, Real>(a), a.last, worker);
  } else if constexpr (Tokens > 1) {
    float32_few<Isa, Value, Tokens - 1>(a, worker);
  }
}

template <class Isa, class Value, class Real>
void float32_any(const LinearOf<Real>& a, Worker& worker) {
  a.m <= Isa::Tuning::kFewTokens ? float32_few<Isa, Value>(a, worker)
                                 : go_through_parts<ManyTokens<Isa, Value, Real>>(a, worker);
}

// y = x @ W^T + bias for any number of tokens; a scale says that the values are int8.
template <class Isa, class Real>
void float32_linear(const LinearOf<Real>& a, Worker& worker) {
  a.scale != nullptr ? float32_any<Isa, int8_t>(a, worker) : float32_any<Isa, bf16>(a, worker);
}

}  // namespace
}  // namespace permllm::cpu
