// What experts do with rows beside products: the activation, and the sums of a token. A template
// for the compiler to vectorise, compiled for each instruction set.
//
// Include after every other header.
#pragma once

#include "cpu/experts/steps.h"
#include "cpu/vector/vector.h"

namespace permllm::cpu {
namespace {

// exp(x) within 2 units of the last place, for |x| < 87; beyond, that of 87. The additions of 1.5 *
// 2^23 round to whole numbers.
inline float exponential(float x) {
  constexpr float kRound = 12582912.0f, kLargest = 87.0f;
  x = x > kLargest ? kLargest : x;
  x = x < -kLargest ? -kLargest : x;
  const float shifted = x * 1.44269504f + kRound;
  const float whole = shifted - kRound;
  const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float power = 1.0f / 5040;
  power = power * rest + 1.0f / 720;
  power = power * rest + 1.0f / 120;
  power = power * rest + 1.0f / 24;
  power = power * rest + 1.0f / 6;
  power = power * rest + 0.5f;
  power = power * rest + 1.0f;
  power = power * rest + 1.0f;
  uint32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127) << 23;  // the whole number stands in the lowest bits of its sum
  float scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return power * scale;
}

constexpr int64_t kGatheredInputs = 64;  // of a row, at a time, that are gathered

// x * sigmoid(x). Below -87 that of -87, which no longer counts beside anything: the exponential
// grows no further there, and x alone would.
inline float silu(float x) {
  const float bounded = x < -87.0f ? -87.0f : x;
  return bounded / (1.0f + exponential(-bounded));
}

// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))), which is x times a sigmoid as well.
inline float gelu_tanh(float x) {
  const float bounded = x < -87.0f ? -87.0f : x;
  return bounded /
         (1.0f + exponential(-bounded * (1.59576912f + 0.0713548163f * bounded * bounded)));
}

// 0 below 0, what is no number stays none.
inline float relu2(float x) { return x < 0.0f ? 0.0f : x * x; }

template <Activation kActivation>
inline float activated(float x) {
  if constexpr (kActivation == Activation::kSilu) return silu(x);
  if constexpr (kActivation == Activation::kGeluTanh) return gelu_tanh(x);
  if constexpr (kActivation == Activation::kRelu2) return relu2(x);
}

template <Activation kActivation, class Real>
inline void activate_inputs(const Real* gate, const Real* up, int64_t count, Real* y) {
  for (int64_t i = 0; i < count; ++i) {
    const float factor = has_gate(kActivation) ? to_float(up[i]) : 1.0f;
    round_to(y[i], activated<kActivation>(to_float(gate[i])) * factor);
  }
}

template <Activation kActivation, class Real>
void activate_row(const Real* gate, int64_t count, const int32_t* gather, Real* y) {
  const Real* up = gate + count;
  if (gather == nullptr) return activate_inputs<kActivation>(gate, up, count, y);
  for (int64_t first = 0; first < count; first += kGatheredInputs) {
    Real gates[kGatheredInputs], ups[kGatheredInputs];
    const int64_t inputs = smaller(kGatheredInputs, count - first);
    for (int64_t i = 0; i < inputs; ++i) {
      gates[i] = gate[gather[first + i]];
      if constexpr (has_gate(kActivation)) ups[i] = up[gather[first + i]];
    }
    activate_inputs<kActivation>(gates, ups, inputs, y + first);
  }
}

template <class Real>
void add_row(const Real* row, int64_t count, float weight, float* sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] += weight * to_float(row[i]);
}

template <class Real>
void round_row(const float* sums, int64_t count, Real* y) {
  for (int64_t i = 0; i < count; ++i) round_to(y[i], sums[i]);
}

template <class Real>
constexpr ExpertSteps<Real> kSteps = {
    {activate_row<Activation::kSilu, Real>, activate_row<Activation::kGeluTanh, Real>,
     activate_row<Activation::kRelu2, Real>},
    add_row<Real>,
    round_row<Real>};

}  // namespace
}  // namespace permllm::cpu
