// How a token becomes integers and back: x is close to quantized * scale, and the largest magnitude
// of the token becomes the largest integer.
//
// Include after every other header.
#pragma once

#include <cstdint>

namespace permllm::cpu {

constexpr int kLargest8 = 127, kLargest16 = 32767;  // W8A8 and W8A16

// Where products take unsigned integers of x, they are shifted: the kernels subtract shift * sum of
// a row's values from every sum.
constexpr int kShift8 = 128, kShift16 = 32768;

// Below it (2^-100) a token counts as zero: its inverse scale would leave float32.
constexpr float kSmallestMagnitude = 0x1p-100f;

namespace {  // compiled for one instruction set after the other

struct TokenScale {
  float scale;
  float inverse;

  TokenScale(float largest_magnitude, int largest_integer)
      : scale(largest_magnitude / static_cast<float>(largest_integer)),
        inverse(largest_magnitude < kSmallestMagnitude
                    ? 0.0f
                    : static_cast<float>(largest_integer) / largest_magnitude) {}
};

}  // namespace

}  // namespace permllm::cpu
