// The choice between the float32 kernels. Include last.
#pragma once

#include "cpu/vector/few.h"
#include "cpu/vector/float32.h"
#include "cpu/vector/kept.h"
#include "cpu/vector/many.h"

namespace permllm::cpu {
namespace {

template <class Products>
void float32_dense(const LinearOf<typename Products::Real>& a, Worker& worker) {
  constexpr int kFew = Products::Tuning::kFewTokens;
  static_assert(Products::Tuning::kPackedTokens == Float32Tuning::kPackedTokens,
                "packed_x is as large");
  a.m <= kFew ? multiply_few_tokens<Products, kFew>(a, worker)
              : go_through_parts<ManyTokens<Products>>(a, worker);
}

template <class Isa, class Value, class Real>
void float32_sparse(const LinearOf<Real>& a, Worker& worker) {
  using Products = Float32Products<Isa, Value, Real>;
  constexpr int kFew = Isa::Tuning::kFewTokens;
  static_assert(Isa::Tuning::kPackedTokens == Float32Tuning::kPackedTokens, "packed_x is as large");
  a.m <= kFew ? multiply_few_tokens<Products, kFew>(a, worker)
              : go_through_parts<KeptTokens<KeptMasks<Isa, Value>, Real>>(a, worker);
}

// y = x @ W^T + bias for any number of tokens; a scale says that the values are int8.
template <class Isa, class Real>
void float32_linear(const LinearOf<Real>& a, Worker& worker) {
  a.scale != nullptr ? float32_sparse<Isa, int8_t>(a, worker)
                     : float32_sparse<Isa, bf16>(a, worker);
}

}  // namespace
}  // namespace permllm::cpu
