// The choice between the kernels of int8 values in vectors of any width. Include last.
#pragma once

#include "cpu/vector/few.h"
#include "cpu/vector/int8.h"
#include "cpu/vector/many.h"

namespace permllm::cpu {
namespace {

// y = x @ W^T + bias for any number of tokens.
template <class Isa, class Value, class Real>
void int8_linear(const LinearOf<Real>& a, Worker& worker) {
  using Tuning = typename Isa::Tuning;
  using Whole = Int8Products<Isa, Value, 1, Real>;
  static_assert(Tuning::kPackedTokens == Float32Tuning::kPackedTokens, "packed_x is as large");
  constexpr int kSplit = Tuning::kSplitTokens, kFew = Tuning::kFewTokens;
  if constexpr (kSplit > 0) {
    using Split = Int8Products<Isa, Value, 2, Real>;
    if (a.m <= kSplit) return multiply_few_tokens<Split, kSplit>(a, worker);
  }
  a.m <= kFew ? multiply_few_tokens<Whole, kFew, kSplit + 1>(a, worker)
              : go_through_parts<ManyTokens<Whole>>(a, worker);
}

}  // namespace
}  // namespace permllm::cpu
