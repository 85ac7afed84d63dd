// Gated activations of tokens, what stands between the two products of an MLP.
#pragma once

#include <cstdint>

#include "activation.h"

namespace permllm::cpu {

// y[t][i] = activation(x[t][i]) * x[t][n + i] in float32, rounded once. Any number of tokens, on
// all threads where there are several.
template <class Real>
void multiply_gated(const Real* x,  // [m, 2 n]
                    Real* y,        // [m, n]
                    int64_t m, int64_t n, Activation activation);

}  // namespace permllm::cpu
