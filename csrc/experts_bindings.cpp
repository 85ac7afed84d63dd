// The operator of mixture-of-experts layers.
#include <torch/csrc/stable/library.h>

#include "cpu/experts/experts.h"
#include "cpu_tensors.h"

namespace permllm {
namespace {

int64_t check_headers(const Tensor& metadata, const char* what) {
  check_dtype(metadata, ScalarType::Long, what, "int64 [experts, fields], as stacking returned it");
  STD_TORCH_CHECK(metadata.dim() == 2 && metadata.size(0) > 0 && metadata.is_contiguous() &&
                      metadata.size(1) == cpu::StackedLinear::kHeader,
                  what, " of shape ", shape(metadata),
                  " is not what stacking returned: it must be [experts, ",
                  cpu::StackedLinear::kHeader, "].");
  return metadata.size(0);
}

// One linear layer of all experts; the weights of those that were chosen are checked.
cpu::StackedLinear check_stack(const Tensor& packed, const Tensor& metadata,
                               const OptionalTensor& permutation, const OptionalTensor& scale,
                               const cpu::Routing& routing, const char* what) {
  const auto* headers = data<int64_t>(metadata);
  check_dtype(packed, ScalarType::Byte, what, "the uint8 bytes that stacking returned");
  STD_TORCH_CHECK(
      packed.is_contiguous() && reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 64 == 0,
      what, " is not aligned to 64 bytes: use the tensor that stacking returned.");
  cpu::StackedLinear linear{static_cast<const char*>(packed.const_data_ptr()),
                            headers,
                            nullptr,
                            nullptr,
                            headers[cpu::header::kOutputs],
                            headers[cpu::header::kInputs]};
  if (permutation.has_value()) {
    check_dtype(*permutation, ScalarType::Int, "permutation", "int32 [experts, in]");
    STD_TORCH_CHECK(permutation->dim() == 2 && permutation->size(0) == routing.experts &&
                        permutation->size(1) == linear.k && permutation->is_contiguous(),
                    "permutation ", shape(*permutation), " of ", what, " must be [",
                    routing.experts, ", ", linear.k, "].");
    linear.gather = data<int32_t>(*permutation);
  }
  if (scale.has_value()) {
    check_dtype(*scale, ScalarType::Float, "scale", "float32 [experts, out]");
    STD_TORCH_CHECK(scale->dim() == 2 && scale->size(0) == routing.experts &&
                        scale->size(1) == linear.n && scale->is_contiguous(),
                    "scale ", shape(*scale), " of ", what, " must be [", routing.experts, ", ",
                    linear.n, "].");
    linear.scale = data<float>(*scale);
  }
  for (int64_t expert = 0; expert < routing.experts; ++expert) {
    if (!routing.chosen(expert)) continue;
    const int64_t* header = headers + expert * cpu::StackedLinear::kHeader;
    const cpu::PackedLayout layout = checked_layout(header);
    const int64_t place = header[cpu::header::kSize], bytes = layout.bytes();
    STD_TORCH_CHECK(layout.n == linear.n && layout.k == linear.k &&
                        layout.isa == static_cast<cpu::Isa>(headers[cpu::header::kIsa]),
                    what, " of expert ", expert, " is ", layout.n, " x ", layout.k,
                    ", that of the first ", linear.n, " x ", linear.k,
                    ": all must be alike, packed for one instruction set.");
    STD_TORCH_CHECK(place >= 0 && place % 64 == 0 && place <= packed.numel() - bytes, what, " has ",
                    packed.numel(), " bytes, its metadata place ", bytes, " of expert ", expert,
                    " at ", place, ": it was truncated or replaced. Stack again.");
    STD_TORCH_CHECK(!cpu::is_dense(layout.type), what, " of expert ", expert,
                    " is dense: experts are sparse.");
    STD_TORCH_CHECK(scale.has_value() == cpu::in_int8(layout.type), "scale of ", what, " is ",
                    scale.has_value() ? "given" : "missing",
                    ": int8 values need one, bfloat16 values have none.");
    if (linear.gather != nullptr) check_gather(linear.gather + expert * linear.k, linear.k);
  }
  return linear;
}

template <class Real>
void multiply(const Tensor& x, const cpu::StackedLinear& gate_up, const cpu::StackedLinear& down,
              const cpu::Routing& routing, Activation activation, int64_t first, int64_t tokens,
              Tensor& y) {
  cpu::ExpertsOf<Real> arguments{data<Real>(x) + first * gate_up.k,
                                 gate_up.k,
                                 tokens,
                                 gate_up,
                                 down,
                                 activation,
                                 static_cast<Real*>(y.mutable_data_ptr()) + first * down.n};
  cpu::multiply_experts(arguments, routing);
}

Tensor sparse_experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor gate_up,
                      Tensor gate_up_metadata, OptionalTensor gate_up_permutation,
                      OptionalTensor gate_up_scale, Tensor down, Tensor down_metadata,
                      OptionalTensor down_permutation, OptionalTensor down_scale,
                      int64_t intermediate_size, int64_t activation) {
  const int64_t experts = check_headers(gate_up_metadata, "gate_up_metadata");
  STD_TORCH_CHECK(check_headers(down_metadata, "down_metadata") == experts, "gate_up has ", experts,
                  " experts, down ", down_metadata.size(0), ": they must be the same.");
  const cpu::PackedLayout one = checked_layout(data<int64_t>(gate_up_metadata));
  const cpu::PackedLayout two = checked_layout(data<int64_t>(down_metadata));
  const Activation of_gate = checked_activation(activation);
  STD_TORCH_CHECK(one.n == outputs_for_input(of_gate) * two.k && one.k == two.n, "gate_up of ",
                  one.n, " x ", one.k, " does not fit down of ", two.n, " x ", two.k,
                  has_gate(of_gate)
                      ? ": it has the outputs of gate and up, and down gives what gate_up takes."
                      : ": without a gate it has what down takes, and down gives what it takes.");
  STD_TORCH_CHECK(two.k == intermediate_size, "intermediate_size is ", intermediate_size,
                  ", down takes ", two.k, " inputs: they must agree.");
  STD_TORCH_CHECK(one.isa == two.isa, "gate_up was packed for instruction set ", cpu::name(one.isa),
                  ", down for ", cpu::name(two.isa), ": pack both for one.");
  check_activations(x, one);
  STD_TORCH_CHECK(x.dim() == 2, "x of shape ", shape(x), " must be [tokens, in].");
  check_dtype(topk_ids, ScalarType::Int, "topk_ids", "int32 [tokens, choices]");
  check_dtype(topk_weights, ScalarType::Float, "topk_weights", "float32 [tokens, choices]");
  STD_TORCH_CHECK(topk_ids.dim() == 2 && topk_ids.size(0) == x.size(0) && topk_weights.dim() == 2 &&
                      topk_weights.size(0) == x.size(0) && topk_weights.size(1) == topk_ids.size(1),
                  "topk_ids ", shape(topk_ids), " and topk_weights ", shape(topk_weights),
                  " must both be [", x.size(0), ", choices] for x ", shape(x), ".");
  const int64_t choices = topk_ids.size(1);
  STD_TORCH_CHECK(choices > 0, "topk_ids ", shape(topk_ids), " choose no expert: one at least.");
  const Tensor rows = in_one_piece(x), ids = in_one_piece(topk_ids);
  const Tensor weights = in_one_piece(topk_weights);
  Tensor y = empty_result(x, two.n);
  if (x.size(0) == 0) return y;
  const auto* id = data<int32_t>(ids);
  const int32_t largest = *std::max_element(id, id + ids.numel());
  STD_TORCH_CHECK(largest < experts, "topk_ids hold ", largest, ", there are ", experts,
                  " experts: less, or below 0 for one elsewhere.");
  const auto run = x.scalar_type() == ScalarType::BFloat16 ? multiply<cpu::bf16>
                   : x.scalar_type() == ScalarType::Half   ? multiply<cpu::fp16>
                                                           : multiply<float>;
  constexpr int64_t kTokensAtOnce = cpu::CommonTuning::kExpertTokens;
  for (int64_t first = 0; first < x.size(0); first += kTokensAtOnce) {
    const int64_t tokens = std::min(kTokensAtOnce, x.size(0) - first);
    const cpu::Routing routing = cpu::route(
        id + first * choices, data<float>(weights) + first * choices, tokens, choices, experts);
    run(rows,
        check_stack(gate_up, gate_up_metadata, gate_up_permutation, gate_up_scale, routing,
                    "gate_up"),
        check_stack(down, down_metadata, down_permutation, down_scale, routing, "down"), routing,
        of_gate, first, tokens, y);
  }
  return y;
}

}  // namespace
}  // namespace permllm

// permllm::sparse_experts itself is defined in permllm_vllm/ops.py, with or without this library.
STABLE_TORCH_LIBRARY_IMPL(permllm, CPU, m) {
  m.impl("sparse_experts", TORCH_BOX(&permllm::sparse_experts));
}
