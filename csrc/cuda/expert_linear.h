// One linear layer of all experts: the kernels for few tokens and for many, with the weight of a
// block's expert. Activations `x` and results `y` are rows of sorted pairs, x permuted already.
#pragma once

#include "experts.h"
#include "few_tokens.h"
#include "many_tokens_mma.h"

namespace permllm::cuda {

constexpr int kManyBytes = many_tokens_shared_bytes(kManyPairs, false);
constexpr int kManyBytesInt8 = many_tokens_shared_bytes(kManyPairs, true);
static_assert(kManyBytes <= kManySharedBytes && kManyBytesInt8 <= kManySharedBytes);

inline int many_pairs_shared_bytes(const StackedLinear& linear) {
  return linear.int8 ? kManyBytesInt8 : kManyBytes;
}

inline Grid expert_linear_grid(const StackedLinear& linear, const ExpertsPlan& plan) {
  return {static_cast<unsigned>(linear.padded_rows / kRowMultiple), 1,
          static_cast<unsigned>(plan.blocks)};
}

// The product of a block's pairs.
template <class Value>
PERMLLM_DEVICE LinearArguments product_of(const ExpertBlock& block, const StackedLinear& linear,
                                          const void* x, void* y) {
  const int64_t weights = int64_t{linear.padded_rows} * linear.padded_inputs * block.expert;
  LinearArguments arguments{};
  arguments.x = static_cast<const uint16_t*>(x) + int64_t{block.first} * linear.inputs;
  arguments.x_stride = linear.inputs;
  arguments.tokens = block.count;
  arguments.values = static_cast<const Value*>(linear.values) + weights / 2;
  arguments.metadata = linear.metadata + weights / 8;
  arguments.scale =
      linear.scale == nullptr ? nullptr : linear.scale + int64_t{linear.rows} * block.expert;
  arguments.y = static_cast<uint16_t*>(y) + int64_t{block.first} * linear.rows;
  arguments.rows = linear.rows;
  arguments.inputs = linear.inputs;
  arguments.padded_rows = linear.padded_rows;
  arguments.padded_inputs = linear.padded_inputs;
  return arguments;
}

// Both kernels request weights before they wait; whose, is written by a kernel in front.
template <class Element, class Value, int kTokenTiles>
PERMLLM_DEVICE void few_pairs_body(const StackedLinear& linear, const ExpertBlock* blocks,
                                   const FewTokensPlan& plan, const void* x, void* y,
                                   unsigned char* shared) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const ExpertBlock block = blocks[blockIdx.z];
  if (block.count == 0) return;
  few_tokens_body<Element, Value, kTokenTiles>(product_of<Value>(block, linear, x, y), plan,
                                               nullptr, blockIdx.x * kRowMultiple, 0, 0, shared);
}

template <class Element, class Value>
PERMLLM_DEVICE void many_pairs_body(const StackedLinear& linear, const ExpertBlock* blocks,
                                    const void* x, void* y, unsigned char* shared) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const ExpertBlock block = blocks[blockIdx.z];
  if (block.count == 0) return;
  many_tokens_body<Element, Value, kManyPairs>(product_of<Value>(block, linear, x, y),
                                               blockIdx.x * kStepRows, 0, shared);
}

}  // namespace permllm::cuda
