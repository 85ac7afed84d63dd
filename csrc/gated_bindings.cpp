// The operators for gated activations, which vLLM has on GPUs.
#include <torch/csrc/stable/library.h>

#include "cpu/gated.h"
#include "cpu_tensors.h"

namespace permllm {
namespace {

template <class Real>
void run(const Tensor& x, Activation activation, Tensor& y) {
  const int64_t n = y.size(-1);
  cpu::multiply_gated(data<Real>(x), static_cast<Real*>(y.mutable_data_ptr()), y.numel() / n, n,
                      activation);
}

Tensor multiply_gated(const Tensor& x, Activation activation) {
  check_activation_dtype(x);
  STD_TORCH_CHECK(x.dim() >= 1 && x.dim() <= kMostDimensions && x.size(-1) % 2 == 0, "x of shape ",
                  shape(x), " has no gate and no factor in its last dimension: it ",
                  "must be even, and there must be 1 to ", kMostDimensions, " dimensions.");
  const Tensor rows = in_one_piece(x);
  Tensor y = empty_result(x, x.size(-1) / 2);
  if (y.numel() == 0) return y;
  const ScalarType dtype = x.scalar_type();
  const auto multiply = dtype == ScalarType::Float  ? run<float>
                        : dtype == ScalarType::Half ? run<cpu::fp16>
                                                    : run<cpu::bf16>;
  multiply(rows, activation, y);
  return y;
}

Tensor silu_and_mul(Tensor x) { return multiply_gated(x, Activation::kSilu); }

Tensor gelu_tanh_and_mul(Tensor x) { return multiply_gated(x, Activation::kGeluTanh); }

}  // namespace
}  // namespace permllm

STABLE_TORCH_LIBRARY_IMPL(permllm, CPU, m) {
  m.impl("silu_and_mul", TORCH_BOX(&permllm::silu_and_mul));
  m.impl("gelu_tanh_and_mul", TORCH_BOX(&permllm::gelu_tanh_and_mul));
}
