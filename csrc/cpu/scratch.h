// Memory that kernels reuse from call to call: nothing is allocated in the steady state.
#pragma once

#include <cstddef>

namespace permllm::cpu {

// What a buffer holds. Each thread owns one buffer per kind, so a thread may use all of them at
// once.
enum class Scratch { kActivations, kTokenScales, kPanel, kSums, kGathered };
constexpr int kScratchKinds = 5;

// At least `bytes` bytes, 64-byte aligned, owned by the calling thread; the content is undefined.
// Valid until the same thread asks for more of the same kind, or ends. Other threads may use the
// buffer while its owner waits for them. Throws std::bad_alloc.
void* thread_scratch(Scratch kind, size_t bytes);

}  // namespace permllm::cpu
