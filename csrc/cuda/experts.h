// A layer of experts: for every token, the sum over those that its router chose of
//   weight * down(activation(gate) * up),  gate and up the halves of gate_up(x),
// or, without a gate, weight * down(activation(gate_up(x))).
//
// Pairs of a token and one of its experts are sorted by expert (expert_routing.h). Their
// activations are gathered in that order, which is where they are permuted (expert_rows.h), and
// blocks multiply pairs of one expert as they would tokens (expert_linear.h). How many pairs an
// expert has is known on the GPU alone, so that no launch depends on it.
//
// What the kernels take, without any header of CUDA, and how they cut their work.
#pragma once

#include "../activation.h"
#include "arguments.h"
#include "few_tokens_plan.h"

namespace permllm::cuda {

constexpr int kMostExperts = 1024;
// Their blocks are the third dimension of a launch: as many as hold 64 pairs, and one more for each
// expert. Where blocks hold fewer, there are fewer.
constexpr int kMostPairs = (kMostBlocks - kMostExperts) * kFewTokens;
constexpr int kManyPairs = 128;              // of a block of the kernel for many tokens
constexpr int kManySharedBytes = 150 << 10;  // that such a block takes at most (expert_linear.h)

// One linear layer of every expert, the packed weights (format.h) one after the other.
struct StackedLinear {
  bool int8;  // values; of the type of x otherwise
  const void* values;
  const uint8_t* metadata;
  const uint8_t* permutation;  // [experts][padded_inputs], or null
  const float* scale;          // [experts][rows], or null
  int rows;
  int inputs;  // a multiple of 8
  int padded_rows;
  int padded_inputs;
};

// Sorted pairs of one expert that a block multiplies: `count` of them, from `first` on.
struct ExpertBlock {
  int expert;
  int first;
  int count;  // 0 where there are fewer blocks
};

constexpr int kExpertBlockInts = sizeof(ExpertBlock) / sizeof(int);

// What routing writes.
struct PairTables {
  ExpertBlock* blocks;  // [ExpertsPlan::blocks]
  int* token;           // of each sorted pair
  int* expert;          // of each sorted pair, -1 behind the last
  int* place;           // of choice c of token t, at t * choices + c: where it is sorted, or -1
};

struct ExpertsArguments {
  ElementType element;  // of x, y and all between
  const void* x;        // 16-byte aligned rows, `x_stride` elements apart
  int64_t x_stride;
  int tokens;
  int choices;
  int experts;           // at most kMostExperts
  const int* ids;        // [tokens][choices]; others than 0..experts - 1 are experts elsewhere
  const float* weights;  // [tokens][choices]
  StackedLinear gate_up;
  StackedLinear down;
  Activation activation;
  PairTables tables;
  // A row for each sorted pair, contiguous. Outputs may lie where the activations were.
  void* gathered;  // [down.rows]
  void* gate_ups;  // [gate_up.rows]
  void* gated;     // [down.inputs]
  void* outputs;   // [down.rows]
  void* y;         // contiguous
};

struct ExpertsPlan {
  int pairs;        // of tokens and their choices, as many as there may be
  int block_pairs;  // that a block multiplies
  int blocks;       // as many as there may be
  // Of blocks that multiply few pairs.
  FewTokensPlan gate_up;
  FewTokensPlan down;

  bool many() const { return block_pairs > kFewTokens; }
  // Of PairTables, in ints.
  int64_t table_ints() const { return int64_t{blocks} * kExpertBlockInts + int64_t{pairs} * 3; }
};

inline PairTables tables_at(int* memory, const ExpertsPlan& plan) {
  int* const pairs = memory + int64_t{plan.blocks} * kExpertBlockInts;
  return {reinterpret_cast<ExpertBlock*>(memory), pairs, pairs + plan.pairs,
          pairs + int64_t{plan.pairs} * 2};
}

// Blocks of `block_pairs` that hold `pairs` of `experts`, at most: of each expert that has any, the
// last may have a single pair.
inline int64_t most_blocks(int64_t pairs, int64_t experts, int64_t block_pairs) {
  const int64_t chosen = std::min(pairs, experts);
  return (pairs + chosen * (block_pairs - 1)) / block_pairs;
}

// Whole rows of inputs to a block: there are as many blocks as experts and more.
inline FewTokensPlan plan_expert_linear(const StackedLinear& linear, int token_tiles) {
  const int steps = linear.padded_inputs / kInputMultiple;
  return {kRowMultiple, token_tiles, steps, 1,
          few_tokens_shared_bytes(kRowMultiple, token_tiles, linear.int8)};
}

// Blocks hold twice what an expert has on average: a weight is then mostly read once. From 64 on,
// blocks are those of the kernel for many tokens, where they find room: for 128 pairs one of them
// takes less than two for few.
inline ExpertsPlan plan_experts(const ExpertsArguments& arguments, const Device& device) {
  const int pairs = arguments.tokens * arguments.choices;
  const int average = (pairs + arguments.experts - 1) / arguments.experts;
  int token_tiles = 1;
  while (token_tiles * 8 < 2 * average && token_tiles * 8 < kFewTokens) token_tiles *= 2;
  const bool many = average >= kFewTokens && kManySharedBytes <= device.shared_bytes_per_block;
  const int block_pairs = many ? kManyPairs : token_tiles * 8;
  return {pairs, block_pairs, static_cast<int>(most_blocks(pairs, arguments.experts, block_pairs)),
          plan_expert_linear(arguments.gate_up, token_tiles),
          plan_expert_linear(arguments.down, token_tiles)};
}

}  // namespace permllm::cuda
