// The choice between the kernels of int8 values with vpdpbusd. Include last.
#pragma once

#include "vector_few.h"
#include "vector_many.h"
#include "vnni.h"

namespace permllm::cpu {
namespace {

// y = x @ W^T + bias for any number of tokens.
template <class Isa, class Value, class Real>
void vnni_linear(const LinearOf<Real>& a, Worker& worker) {
  using Tuning = typename Isa::Int8Tuning;
  using Whole = VnniProducts<Isa, Value, 1, Real>;
  if (a.m <= Tuning::kSplitTokens) {
    return multiply_few_tokens<VnniProducts<Isa, Value, 2, Real>, Tuning::kSplitTokens>(a, worker);
  }
  a.m <= Tuning::kFewTokens ? multiply_few_tokens<Whole, Tuning::kFewTokens>(a, worker)
                            : go_through_parts<ManyTokens<Whole>>(a, worker);
}

}  // namespace
}  // namespace permllm::cpu
