// What experts do between their two products.
#pragma once

namespace permllm {

// Numbers of the operator's argument. The first linear gives a gate, which is activated, and what
// it is multiplied with, one behind the other; without a gate, what is activated alone.
enum class Activation { kSilu, kGeluTanh, kRelu2 };
constexpr int kActivations = 3;

constexpr bool has_gate(Activation activation) { return activation != Activation::kRelu2; }

// Rows of the first linear for every input of the second.
constexpr int outputs_for_input(Activation activation) { return has_gate(activation) ? 2 : 1; }

}  // namespace permllm
