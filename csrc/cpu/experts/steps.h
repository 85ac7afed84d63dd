// The steps of experts between and behind the products (experts/rows.h), by instruction set.
#pragma once

#include <cstdint>

#include "activation.h"
#include "cpu/isa.h"
#include "cpu/packing/layout.h"

namespace permllm::cpu {

template <class Real>
struct ExpertSteps {
  // y[i] = activation(gate[g]) * gate[count + g], or without the factor; g = i or gather[i]
  void (*activate[kActivations])(const Real* gate, int64_t count, const int32_t* gather, Real* y);
  // sums[i] += weight * row[i]
  void (*add)(const Real* row, int64_t count, float weight, float* sums);
  void (*round)(const float* sums, int64_t count, Real* y);
};

// Those of an instruction set, whatever else it has.
template <class Real>
ExpertSteps<Real> steps_of(Isa isa);

template <class Real>
ExpertSteps<Real> avx512_expert_steps();
template <class Real>
ExpertSteps<Real> avx2_expert_steps();
template <class Real>
ExpertSteps<Real> portable_expert_steps();

}  // namespace permllm::cpu
