// The kernel for many tokens on sm_90 that permutes activations itself, for tiles of few tokens.
#pragma once

#include "many_tokens_sm90.h"
#include "permuted_mainloop_sm90.h"

namespace permllm::cuda::sm90 {

using cute::_32;

// The tiles of kernel_choice.h. The two blocks of a cluster share the weights that they load.
template <class T, class Tokens>
using PermutingGemm = Gemm<T, cute::Shape<_128, Tokens, _128>, cute::Shape<_1, _2, _1>, Pingpong,
                           PingpongEpilogue, PermutedMainloop>;

template <class T>
int run_permuting(const LinearArguments& arguments, int tile, const Device& device, void* stream) {
  return tile == 64 ? PermutingGemm<T, _64>::run(arguments, device, stream)
                    : PermutingGemm<T, _32>::run(arguments, device, stream);
}

}  // namespace permllm::cuda::sm90
