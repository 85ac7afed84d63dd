// Memory that kernels reuse from call to call: nothing is allocated in the steady state.
#pragma once

#include <cstddef>
#include <cstdint>

namespace permllm::cpu {

// What a buffer holds. Each thread owns one buffer per kind, so a thread may use all of them at
// once.
enum class Scratch {
  kActivations,
  kTokenScales,
  kPanel,
  kSums,
  kGathered,
  kRouting,
  kGateUp,
  kGated,
  kExpertOutputs,
  kTokenSums
};
constexpr int kScratchKinds = 10;

// At least `bytes` bytes, 64-byte aligned, owned by the calling thread; the content is undefined.
// Valid until the same thread asks for more of the same kind, or ends. Other threads may use the
// buffer while its owner waits for them. Throws std::bad_alloc.
void* thread_scratch(Scratch kind, size_t bytes);

// The same for `count` elements.
template <class T>
T* scratch_of(Scratch kind, int64_t count) {
  return static_cast<T*>(thread_scratch(kind, static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace permllm::cpu
