// One parallel region for a call.
#pragma once

#include "kernels.h"

namespace permllm::cpu {

// A kernel, and the memory that it packs x into.
template <class Real>
struct KernelOf {
  void (*run)(const LinearOf<Real>&, Worker&) = nullptr;
  int64_t packed_tokens = 0;  // at a time, at most
  int64_t input_bytes = 0;    // of an input of a token, at most
};

// Runs a kernel on every thread. With `gather` (absolute input indices [k], all of them in 0..k-1)
// it sees x[:, gather] instead of x, CommonTuning::kGatheredTokens at a time.
template <class Real>
void run_in_region(const KernelOf<Real>& kernel, const LinearOf<Real>& arguments,
                   const int32_t* gather);

}  // namespace permllm::cpu
