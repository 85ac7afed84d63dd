// The operators for norms, which vLLM has on GPUs.
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "cpu/norm.h"
#include "cpu_tensors.h"

namespace permllm {
namespace {

template <class Real, class Weight>
void run(const Tensor& x, Tensor* residual, const OptionalTensor& weight, float epsilon,
         Tensor& y) {
  const int64_t n = x.size(-1);
  cpu::norm(cpu::NormOf<Real, Weight>{
      data<Real>(x),
      residual == nullptr ? nullptr : static_cast<Real*>(residual->mutable_data_ptr()),
      weight.has_value() ? data<Weight>(*weight) : nullptr,
      static_cast<Real*>(y.mutable_data_ptr()), x.numel() / n, n, epsilon});
}

void check(const Tensor& x, const OptionalTensor& weight) {
  STD_TORCH_CHECK(cpu::has_norm(), "instruction set ", cpu::name(cpu::select("")),
                  " has no kernel for norms: they need AVX2.");
  check_activation_dtype(x);
  STD_TORCH_CHECK(x.dim() >= 1 && x.dim() <= kMostDimensions, "x has ", x.dim(),
                  " dimensions, 1 to ", kMostDimensions, " are taken.");
  if (!weight.has_value()) return;
  STD_TORCH_CHECK(
      weight->is_cpu() && weight->is_contiguous() && weight->dim() == 1 &&
          weight->size(0) == x.size(-1) &&
          (weight->scalar_type() == x.scalar_type() || weight->scalar_type() == ScalarType::Float),
      "weight of shape ", shape(*weight), " does not fit x of shape ", shape(x),
      ": it must be contiguous, one for each of the last dimension, in the dtype of x "
      "or float32.");
}

void normalize(const Tensor& x, Tensor* residual, const OptionalTensor& weight, double epsilon,
               Tensor& y) {
  if (x.numel() == 0) return;
  const ScalarType dtype = x.scalar_type();
  const bool exact = weight.has_value() && weight->scalar_type() == ScalarType::Float;
  const auto norm = dtype == ScalarType::Float ? run<float, float>
                    : dtype == ScalarType::Half
                        ? (exact ? run<cpu::fp16, float> : run<cpu::fp16, cpu::fp16>)
                    : exact ? run<cpu::bf16, float>
                            : run<cpu::bf16, cpu::bf16>;
  norm(x, residual, weight, static_cast<float>(epsilon), y);
}

Tensor rms_norm(Tensor x, OptionalTensor weight, double epsilon) {
  check(x, weight);
  const Tensor rows = in_one_piece(x);
  Tensor y = empty_result(x, x.size(-1));
  normalize(rows, nullptr, weight, epsilon, y);
  return y;
}

// Overwrites x with the norm, and the residual with the sum.
void add_rms_norm_(Tensor x, Tensor residual, OptionalTensor weight, double epsilon) {
  check(x, weight);
  bool alike = residual.is_cpu() && residual.scalar_type() == x.scalar_type() &&
               residual.dim() == x.dim() && x.is_contiguous() && residual.is_contiguous();
  for (int64_t i = 0; alike && i < x.dim(); ++i) alike = residual.size(i) == x.size(i);
  STD_TORCH_CHECK(alike, "residual of shape ", shape(residual), " and x of shape ", shape(x),
                  " must be contiguous and alike in shape and dtype.");
  normalize(x, &residual, weight, epsilon, x);
}

// Whether the others run here.
bool cpu_has_norm() { return cpu::has_norm(); }

}  // namespace
}  // namespace permllm

// The operators themselves are defined in permllm_vllm/ops.py, with or without this library.
STABLE_TORCH_LIBRARY_FRAGMENT(permllm, m) { m.def("cpu_has_norm() -> bool"); }

STABLE_TORCH_LIBRARY_IMPL(permllm, CompositeExplicitAutograd, m) {
  m.impl("cpu_has_norm", TORCH_BOX(&permllm::cpu_has_norm));
}

STABLE_TORCH_LIBRARY_IMPL(permllm, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&permllm::rms_norm));
  m.impl("add_rms_norm_", TORCH_BOX(&permllm::add_rms_norm_));
}
