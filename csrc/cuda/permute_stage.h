// Permutes activations in shared memory, where they were copied to and tensor cores will read them:
// between TMA and wgmma (permuted_mainloop_sm90.h), and between cp.async and mma.sp (few_tokens.h).
//
// A stage holds tokens x 128 inputs of 16 bits: first inputs 0..63 of every token, 128 bytes each,
// then inputs 64..127. Of each 128 bytes the eight units of 16 lie in another order, unit ^ r with
// r from the address (the 128-byte swizzle), which is the same for every eighth token. The
// permutation stays within the 128 inputs of a token, so it takes no memory but the stage and no
// order among warps: each has tokens of its own.
#pragma once

#include "device.h"
#include "format.h"

namespace permllm::cuda {

constexpr int kPermutingThreads = 128;  // a warp group, or the block for few tokens
constexpr int kSwizzledBytes = 128;     // 64 inputs of a token
constexpr int kSwizzleTokens = 8;       // after which the order of units is the same again

template <int kTokens>
constexpr int kStageBytes = kTokens * 2 * kSwizzledBytes;

// Where an input of a token is in a stage that begins at a multiple of 1024.
template <int kTokens>
PERMLLM_HOST_DEVICE constexpr int activation_byte(int token, int input) {
  const int unit = (input % 64 / 8) ^ (token % kSwizzleTokens);
  return (input / 64 * kTokens + token) * kSwizzledBytes + unit * 16 + input % 8 * 2;
}

// The permutation of the four inputs that `lane` writes of every token, a byte each: inputs 2 lane,
// 2 lane + 1, 2 lane + 64 and 2 lane + 65 of the 128 of this step.
PERMLLM_DEVICE uint32_t load_places(const uint8_t* permutation, int step, int lane) {
  const auto* pairs =
      reinterpret_cast<const uint16_t*>(permutation + int64_t{step} * kPermutationBlock);
  return pairs[lane] | uint32_t{pairs[lane + 32]} << 16;
}

// Called by 128 threads with the places of their lanes, for the first `tokens` of a stage: warp w
// permutes tokens 2 w and 2 w + 1 of every eight, which its lanes see. `store(target, word)` writes
// four bytes.
template <int kTokens, class Store>
PERMLLM_DEVICE void permute_tokens(unsigned char* stage, uint32_t places, int thread, int tokens,
                                   const Store& store) {
  static_assert(kTokens % kSwizzleTokens == 0);
  constexpr int kHalfBytes = kTokens * kSwizzledBytes;
  constexpr int kRows = kTokens / kSwizzleTokens;
  constexpr int kRowBytes = kSwizzleTokens * kSwizzledBytes;  // from one to the next
  const int lane = thread % 32;
  const int warp = thread / 32;
  PERMLLM_UNROLL
  for (int j = 0; j < 2; ++j) {  // of the warp's two tokens in every eight
    unsigned char* row = stage + (2 * warp + j) * kSwizzledBytes;
    const int swizzle = reinterpret_cast<uintptr_t>(row) / kSwizzledBytes % 8;
    const unsigned char* sources[4];
    PERMLLM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int place = places >> (8 * i) & (kPermutationBlock - 1);
      sources[i] =
          row + place / 64 * kHalfBytes + ((place % 64 / 8) ^ swizzle) * 16 + place % 8 * 2;
    }
    unsigned char* target = row + ((lane / 4) ^ swizzle) * 16 + lane % 4 * 4;
    const auto is_there = [&](int r) { return r * kSwizzleTokens + 2 * warp + j < tokens; };
    uint32_t words[kRows][2];
    PERMLLM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      // Of several rows all are read, those of tokens that are not there for nothing: each
      // condition would be a branch, and the reads of one row would wait for those of the row
      // before.
      if (kRows == 1 && !is_there(r)) continue;
      PERMLLM_UNROLL
      for (int half = 0; half < 2; ++half) {
        const auto at = [&](int i) {
          return *reinterpret_cast<const uint16_t*>(sources[2 * half + i] + r * kRowBytes);
        };
        words[r][half] = at(0) | uint32_t{at(1)} << 16;
      }
    }
    sync_warp();  // before it writes them, every lane has read these tokens
    PERMLLM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (!is_there(r)) continue;
      PERMLLM_UNROLL
      for (int half = 0; half < 2; ++half) {
        store(target + half * kHalfBytes + r * kRowBytes, words[r][half]);
      }
    }
  }
}

// The whole stage. wgmma may read it once all threads have met after it.
template <int kTokens>
PERMLLM_DEVICE void permute_stage(unsigned char* stage, uint32_t places, int thread) {
  permute_tokens<kTokens>(stage, places, thread, kTokens,
                          [](unsigned char* target, uint32_t word) { store_shared(target, word); });
  show_tensor_cores();
}

}  // namespace permllm::cuda
