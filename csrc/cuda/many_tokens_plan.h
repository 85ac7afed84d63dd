// How the kernel of mma.sp for many tokens cuts its work.
#pragma once

#include "arguments.h"
#include "few_tokens_plan.h"

namespace permllm::cuda {

constexpr int kMmaTiles[] = {128, 64};  // tokens of a block

// Stages in flight: two where a processor has little shared memory, three where it has more.
PERMLLM_HOST_DEVICE constexpr int many_tokens_stages(int tokens, bool int8) {
  return tokens == 64 || int8 ? 2 : 3;
}

// Of a block of 128 rows by `tokens`: weights and activations.
PERMLLM_HOST_DEVICE constexpr int many_tokens_shared_bytes(int tokens, bool int8) {
  return many_tokens_stages(tokens, int8) *
         (weight_stage_bytes(kRowMultiple, int8) + tokens * kInputMultiple * 2);
}

// Tokens of a block: the larger tile where the shared memory of a block holds it.
inline int many_tokens_tile(bool int8, const Device& device) {
  return many_tokens_shared_bytes(128, int8) <= device.shared_bytes_per_block ? 128 : 64;
}

// What a step of 128 inputs takes of shared memory: weights and activations are written once. A
// warp multiplies 64 rows by 32 tokens, so that weights are read for every 32 tokens, and
// activations twice.
constexpr int many_tokens_step_clocks(int tokens, bool int8) {
  return (weight_stage_bytes(kRowMultiple, int8) * (1 + tokens / 32) +
          tokens * kInputMultiple * 2 * (1 + 2)) /
         kSharedBytesPerClock;
}
static_assert(many_tokens_step_clocks(128, false) == 1488);
static_assert(many_tokens_step_clocks(128, true) == 1168);

}  // namespace permllm::cuda
