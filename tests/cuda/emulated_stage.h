// Stages of activations on the emulator: TMA has filled them when the previous kernel has ended, a
// warp group permutes one after the other, and wgmma reads each.
#pragma once

#include "guarded.h"
#include "permute_stage.h"

namespace permllm::cuda {

// The waits of the kernel around permute_stage, which is CUTLASS' own.
inline void wait_for_activations() {
  if (emulator::block->previous_kernel_ends) emulator::leave(emulator::Fibre::kAtPreviousKernel);
  emulator::block->current->has_waited = true;
}
inline void meet() { emulator::leave(emulator::Fibre::kAtBlock); }

// `stages` are as many as `permutation` has blocks of 128, in `seen` as wgmma has read them.
template <int kTokens>
void permute_stages(Guarded& stages, Guarded& permutation, int count, unsigned char* seen,
                    unsigned seed) {
  constexpr int kBytes = kStageBytes<kTokens>;
  Guarded nothing(0);
  emulator::stored.clear();
  launch_after_another(
      {1}, kPermutingThreads, seed, nothing, {&stages, &permutation}, nothing, [&] {
        wait_for_activations();
        for (int step = 0; step < count; ++step) {
          const int thread = threadIdx.x;
          unsigned char* stage = stages.data + step * kBytes;
          permute_stage<kTokens>(stage, load_places(permutation.data, step, thread % 32), thread);
          meet();
          tensor_cores_read();
          if (thread == 0) std::memcpy(seen + step * kBytes, stage, kBytes);
          emulator::leave(emulator::Fibre::kAtBlock);
        }
      });
}

}  // namespace permllm::cuda
