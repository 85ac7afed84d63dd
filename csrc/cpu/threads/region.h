// One parallel region for a call.
#pragma once

#include "cpu/kernels.h"
#include "cpu/threads/threads.h"

namespace permllm::cpu {

// A kernel, and the memory that it packs x into.
template <class Real>
struct KernelOf {
  void (*run)(const LinearOf<Real>&, Worker&) = nullptr;
  int64_t packed_tokens = 0;  // at a time, at most
  int64_t input_bytes = 0;    // of an input of a token, at most
};

// What the workers of a kernel share of memory: bytes that x is packed into, and scales of tokens.
struct InputMemory {
  int64_t bytes = 0;
  int64_t scales = 0;
};

// That of a kernel for m tokens of k inputs.
template <class Real>
InputMemory input_memory(const KernelOf<Real>& kernel, int64_t m, int64_t k) {
  constexpr int64_t kTokenUnit = 16;  // that packed tokens are padded to, as kernels.h says
  const auto padded = [](int64_t count, int64_t unit) { return ceil_div(count, unit) * unit; };
  const int64_t at_once = m < kernel.packed_tokens ? m : kernel.packed_tokens;
  const int64_t tokens = padded(at_once, kTokenUnit);
  return {tokens * padded(k, kBlockInputs) * kernel.input_bytes, 2 * tokens};
}

// Runs body(worker) on every thread of one region.
template <class Body>
void in_region(Body body) {
  const int64_t workers = thread_count();
  Team team(workers);
  parallel_for(workers, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      Worker worker(team, index);
      body(worker);
    }
  });
}

// Runs a kernel on every thread. With `gather` (absolute input indices [k], all of them in 0..k-1)
// it sees x[:, gather] instead of x, CommonTuning::kGatheredTokens at a time.
template <class Real>
void run_in_region(const KernelOf<Real>& kernel, const LinearOf<Real>& arguments,
                   const int32_t* gather);

}  // namespace permllm::cpu
