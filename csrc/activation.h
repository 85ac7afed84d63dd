// What experts do with their gate.
#pragma once

namespace permllm {

enum class Activation { kSilu, kGeluTanh };  // numbers of the operator's argument
constexpr int kActivations = 2;

}  // namespace permllm
