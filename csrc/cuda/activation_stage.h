// Activations of one step in shared memory, where cp.async brings them, a permutation reorders them
// in place, and mma.sp reads them.
//
// A stage holds tokens x 128 inputs of 16 bits: first inputs 0..63 of every token, 128 bytes each,
// then inputs 64..127. Of each 128 bytes the eight units of 16 lie in another order, unit ^ r with
// r from the address, which is the same for every eighth token: rows that ldmatrix reads together
// lie in different banks. The permutation stays within the 128 inputs of a token, so it takes no
// memory but the stage and no order among warps: each has tokens of its own.
#pragma once

#include "arguments.h"
#include "device.h"
#include "format.h"

namespace permllm::cuda {

constexpr int kRowBytes = 128;     // 64 inputs of a token
constexpr int kSwizzleTokens = 8;  // after which the order of units is the same again
constexpr int kEightBytes = kSwizzleTokens * kRowBytes;  // from a token to the eighth after it

template <int kTokens>
constexpr int kActivationBytes = kTokens * 2 * kRowBytes;

// Where an input of a token is in a stage that begins at a multiple of 1024.
template <int kTokens>
PERMLLM_HOST_DEVICE constexpr int activation_byte(int token, int input) {
  const int unit = (input % 64 / 8) ^ (token % kSwizzleTokens);
  return (input / 64 * kTokens + token) * kRowBytes + unit * 16 + input % 8 * 2;
}

// The permutation of the four inputs that `lane` writes of every token, a byte each: inputs 2 lane,
// 2 lane + 1, 2 lane + 64 and 2 lane + 65 of the 128 of this step.
PERMLLM_DEVICE uint32_t load_places(const uint8_t* permutation, int step, int lane) {
  const auto* pairs =
      reinterpret_cast<const uint16_t*>(permutation + int64_t{step} * kPermutationBlock);
  return pairs[lane] | uint32_t{pairs[lane + 32]} << 16;
}

// Called by all threads of a block with the places of their lanes, for the first `tokens` of a
// stage: warp w permutes tokens 2 w and 2 w + 1 of every eight, which its lanes see.
template <int kTokens>
PERMLLM_DEVICE void permute_tokens(unsigned char* stage, uint32_t places, int tokens) {
  static_assert(kTokens % kSwizzleTokens == 0);
  constexpr int kHalfBytes = kTokens * kRowBytes;
  constexpr int kRows = kTokens / kSwizzleTokens;
  const int lane = threadIdx.x % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  PERMLLM_UNROLL
  for (int j = 0; j < 2; ++j) {  // of the warp's two tokens in every eight
    unsigned char* row = stage + (2 * warp + j) * kRowBytes;
    const int swizzle = reinterpret_cast<uintptr_t>(row) / kRowBytes % 8;
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
          return *reinterpret_cast<const uint16_t*>(sources[2 * half + i] + r * kEightBytes);
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
        *reinterpret_cast<uint32_t*>(target + half * kHalfBytes + r * kEightBytes) = words[r][half];
      }
    }
  }
}

// What a thread brings of the activations of a step: the same 8 inputs of one token in every eight.
// Of the tokens that its own warp permutes, so that no other has to wait for them. Inputs past the
// last are zeros; what lies in a stage for tokens past the last goes into no result.
template <int kTokens>
struct ActivationCopies {
  const uint16_t* x;  // of the first token, at the first input of the layer
  int64_t row_stride;
  int inputs;       // of the layer
  int first_token;  // of the block's
  int tokens;       // of the block, at most kTokens
  int first_input;  // of the 128 of a step

  PERMLLM_DEVICE ActivationCopies(const LinearArguments& arguments, int token)
      : row_stride(kSwizzleTokens * arguments.x_stride), inputs(arguments.inputs) {
    const int lane = threadIdx.x % 32;
    first_token = static_cast<int>(threadIdx.x) / 32 * 2 + lane / 16;
    first_input = lane % 16 * 8;
    tokens = arguments.tokens - token < kTokens ? arguments.tokens - token : kTokens;
    x = static_cast<const uint16_t*>(arguments.x) + (token + first_token) * arguments.x_stride;
  }

  PERMLLM_DEVICE bool is_valid(int64_t input) const { return input + first_input < inputs; }
  PERMLLM_DEVICE unsigned char* target(unsigned char* stage) const {
    return stage + activation_byte<kTokens>(first_token, first_input);
  }

  // Starts the copies of the step that begins at `input`. A loop, for the sake of registers.
  PERMLLM_DEVICE void start(unsigned char* stage, int64_t input) const {
    const bool valid = is_valid(input);
    const uint16_t* source = valid ? x + input + first_input : x;
    unsigned char* row = target(stage);
    PERMLLM_LOOP
    for (int token = first_token; token < tokens; token += kSwizzleTokens) {
      copy_async_16(row, source, valid);
      source += row_stride;
      row += kEightBytes;
    }
  }

  // Brings `kSteps` steps through registers: all their loads are on their way together.
  template <int kSteps, class Stage, class Input>
  PERMLLM_DEVICE void load(const Stage& stage_of, const Input& input_of) const {
    constexpr int kRows = kTokens / kSwizzleTokens;
    const auto is_there = [&](int r) { return first_token + r * kSwizzleTokens < tokens; };
    uint4 units[kSteps][kRows] = {};
    PERMLLM_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const uint16_t* source = x + input_of(step) + first_input;
      PERMLLM_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (is_there(r) && is_valid(input_of(step))) {
          units[step][r] = *reinterpret_cast<const uint4*>(source + r * row_stride);
        }
      }
    }
    PERMLLM_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      PERMLLM_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (!is_there(r)) continue;
        *reinterpret_cast<uint4*>(target(stage_of(step)) + r * kEightBytes) = units[step][r];
      }
    }
  }
};

}  // namespace permllm::cuda
