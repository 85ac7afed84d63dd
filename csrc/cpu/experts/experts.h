// A layer of experts: for every token, the sum over those that its router chose of
//   weight * down(activation(gate) * up),  gate and up the halves of gate_up(x),
// or, without a gate, weight * down(activation(gate_up(x))).
#pragma once

#include "activation.h"
#include "cpu/experts/routing.h"
#include "cpu/kernels.h"

namespace permllm::cpu {

// One linear layer of every expert, the packed weights one after the other. A header is that of one
// packed weight (layout.h), with the place of its bytes.
struct StackedLinear {
  static constexpr int64_t kHeader = header::kSize + 1;

  const char* packed;
  const int64_t* headers;  // [experts, kHeader]
  const int32_t* gather;   // [experts, k], absolute input indices, or null
  const float* scale;      // [experts, n] for int8 values, or null
  int64_t n;
  int64_t k;
};

template <class Real>
struct ExpertsOf {
  const Real* x;  // [tokens, gate_up.k], rows x_stride elements apart
  int64_t x_stride;
  int64_t tokens;
  StackedLinear gate_up;  // n is outputs_for_input times the k of down
  StackedLinear down;
  Activation activation;
  Real* y;  // [tokens, down.n], contiguous
};

// The sums of a token's experts are float32, ascending by expert, so that the other tokens change
// no bit of them where the kernels are the same.
template <class Real>
void multiply_experts(const ExpertsOf<Real>& arguments, const Routing& routing);

}  // namespace permllm::cpu
