// What happens to rows of activations before, between and after the products of experts. A thread
// has 8 elements, 16 bytes of one row.
#pragma once

#include "element.h"
#include "experts.h"
#include "format.h"

namespace permllm::cuda {

constexpr int kRowThreads = 128;
constexpr int kRowElements = 8;  // of a thread
constexpr int kRowSharedBytes = kRowThreads * kRowElements * 2;

// A block for every kRowThreads * kRowElements columns of a row.
inline Grid row_grid(int rows, int columns) {
  constexpr int kColumns = kRowThreads * kRowElements;
  return {static_cast<unsigned>(rows), static_cast<unsigned>((columns + kColumns - 1) / kColumns)};
}

PERMLLM_DEVICE int row_column() {
  return (static_cast<int>(blockIdx.y) * kRowThreads + static_cast<int>(threadIdx.x)) *
         kRowElements;
}

// Writes target[j] = of(j - j % 128 + permutation[j]), where load(j) gives of(j), ..., of(j + 7).
// Blocks of 128 columns lie within a warp.
template <class Load>
PERMLLM_DEVICE void write_row(uint16_t* target, int columns, const uint8_t* permutation,
                              unsigned char* shared, const Load& load) {
  const int thread = threadIdx.x;
  const int column = row_column();
  const bool valid = column < columns;
  uint4 value = valid ? load(column) : uint4{};
  if (permutation != nullptr) {
    auto* staged = reinterpret_cast<uint16_t*>(shared);
    *reinterpret_cast<uint4*>(staged + thread * kRowElements) = value;
    sync_warp();  // the blocks of this warp are there
    const int block = thread * kRowElements / kPermutationBlock * kPermutationBlock;
    alignas(16) uint16_t permuted[kRowElements];
    PERMLLM_UNROLL
    for (int i = 0; i < kRowElements; ++i) {
      const int place = valid ? permutation[column + i] % kPermutationBlock : 0;
      permuted[i] = staged[block + place];
    }
    value = *reinterpret_cast<const uint4*>(permuted);
  }
  if (valid) *reinterpret_cast<uint4*>(target + column) = value;
}

PERMLLM_DEVICE const uint8_t* permutation_of(const StackedLinear& linear, int expert) {
  if (linear.permutation == nullptr) return nullptr;
  return linear.permutation + int64_t{expert} * linear.padded_inputs;
}

// A row of grid.x for each sorted pair: the activations of its token, as gate and up take them.
PERMLLM_DEVICE void gather_body(const ExpertsArguments& arguments, unsigned char* shared) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int pair = blockIdx.x;
  const int expert = arguments.tables.expert[pair];
  if (expert < 0) return;
  const auto* x =
      static_cast<const uint16_t*>(arguments.x) + arguments.tables.token[pair] * arguments.x_stride;
  const int columns = arguments.gate_up.inputs;
  write_row(static_cast<uint16_t*>(arguments.gathered) + int64_t{pair} * columns, columns,
            permutation_of(arguments.gate_up, expert), shared,
            [&](int column) { return *reinterpret_cast<const uint4*>(x + column); });
}

// g * sigmoid(g), or gelu with tanh, which is g times a sigmoid as well; or the square of relu.
PERMLLM_DEVICE float activated(float g, Activation activation) {
  if (activation == Activation::kRelu2) return g < 0 ? 0 : g * g;
  const float turned =
      activation == Activation::kSilu ? g : g * (1.59576912f + 0.0713548163f * g * g);
  return g / (1 + exponential(-turned));
}

// activation(gate) * up of each sorted pair, or activation(gate), rounded once, as down takes it.
template <class Element>
PERMLLM_DEVICE void gate_body(const ExpertsArguments& arguments, unsigned char* shared) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int pair = blockIdx.x;
  const int expert = arguments.tables.expert[pair];
  if (expert < 0) return;
  const int columns = arguments.down.inputs;
  const uint16_t* gates =
      static_cast<const uint16_t*>(arguments.gate_ups) + int64_t{pair} * arguments.gate_up.rows;
  write_row(static_cast<uint16_t*>(arguments.gated) + int64_t{pair} * columns, columns,
            permutation_of(arguments.down, expert), shared, [&](int column) {
              alignas(16) uint16_t gate[kRowElements];
              *reinterpret_cast<uint4*>(gate) = *reinterpret_cast<const uint4*>(gates + column);
              float inner[kRowElements];
              PERMLLM_UNROLL
              for (int i = 0; i < kRowElements; ++i) {
                inner[i] = activated(Element::to_float(gate[i]), arguments.activation);
              }
              if (has_gate(arguments.activation)) {
                alignas(16) uint16_t up[kRowElements];
                *reinterpret_cast<uint4*>(up) =
                    *reinterpret_cast<const uint4*>(gates + columns + column);
                PERMLLM_UNROLL
                for (int i = 0; i < kRowElements; ++i) inner[i] *= Element::to_float(up[i]);
              }
              PERMLLM_UNROLL
              for (int i = 0; i < kRowElements; ++i) gate[i] = Element::from_float(inner[i]);
              return *reinterpret_cast<const uint4*>(gate);
            });
}

// A row of grid.x for each token: what its experts give, times their weights, added in float32 in
// the order of its choices and rounded once.
template <class Element>
PERMLLM_DEVICE void combine_body(const ExpertsArguments& arguments) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t token = blockIdx.x;
  const int column = row_column();
  const int columns = arguments.down.rows;
  if (column >= columns) return;
  float sums[kRowElements] = {};
  for (int64_t pair = token * arguments.choices; pair < (token + 1) * arguments.choices; ++pair) {
    const int place = arguments.tables.place[pair];
    if (place < 0) continue;
    const float weight = arguments.weights[pair];
    alignas(16) uint16_t output[kRowElements];
    *reinterpret_cast<uint4*>(output) = *reinterpret_cast<const uint4*>(
        static_cast<const uint16_t*>(arguments.outputs) + int64_t{place} * columns + column);
    PERMLLM_UNROLL
    for (int i = 0; i < kRowElements; ++i) sums[i] += weight * Element::to_float(output[i]);
  }
  alignas(16) uint16_t rounded[kRowElements];
  PERMLLM_UNROLL
  for (int i = 0; i < kRowElements; ++i) rounded[i] = Element::from_float(sums[i]);
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(arguments.y) + token * columns + column) =
      *reinterpret_cast<const uint4*>(rounded);
}

}  // namespace permllm::cuda
