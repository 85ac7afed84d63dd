// The operator of mixture-of-experts layers on NVIDIA GPUs. It waits for nothing that the GPU
// computes: what the router chose decides within the kernels alone.
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "cuda_tensors.h"
#include "experts.h"

namespace permllm::cuda {
namespace {

// One linear layer of all experts: rows x inputs, both known to the caller.
StackedLinear check_stack(const Tensor& x, const Tensor& packed, const Tensor& metadata,
                          const OptionalTensor& permutation, const OptionalTensor& scale,
                          int64_t experts, int64_t rows, int64_t inputs, const std::string& name) {
  STD_TORCH_CHECK(packed.dim() == 3 && packed.size(0) == experts &&
                      packed.size(1) == round_up(rows, kRowMultiple) &&
                      packed.size(2) * 2 == round_up(inputs, kInputMultiple),
                  name, " of shape ", shape(packed), " must be [", experts, ", ",
                  round_up(rows, kRowMultiple), ", ", round_up(inputs, kInputMultiple) / 2,
                  "] for ", rows, " outputs and ", inputs,
                  " inputs, both padded to multiples of 128: use what the CUDA backend stacked.");
  const int64_t padded_rows = packed.size(1), padded_inputs = packed.size(2) * 2;
  check_extent(packed, padded_rows, padded_inputs, name.c_str());
  StackedLinear linear{};
  linear.int8 = packed.scalar_type() == ScalarType::Char;
  const int64_t weights = experts * padded_rows * padded_inputs;
  check_part(packed, x, linear.int8 ? ScalarType::Char : x.scalar_type(), weights / 2, name.c_str(),
             "values of the dtype of x, or int8,");
  check_part(metadata, x, ScalarType::Byte, weights / 8, (name + "_metadata").c_str(), "uint8");
  if (permutation.has_value()) {
    check_part(*permutation, x, ScalarType::Byte, experts * padded_inputs,
               (name + "_permutation").c_str(), "uint8");
    linear.permutation = data<uint8_t>(*permutation);
  }
  STD_TORCH_CHECK(scale.has_value() == linear.int8, name, "_scale is ",
                  scale.has_value() ? "there" : "missing", " but ", name, " is ",
                  linear.int8 ? "int8" : "not int8", ": pass what the CUDA backend stacked.");
  if (scale.has_value()) {
    check_part(*scale, x, ScalarType::Float, experts * rows, (name + "_scale").c_str(), "float32");
    linear.scale = data<float>(*scale);
  }
  linear.values = packed.const_data_ptr();
  linear.metadata = data<uint8_t>(metadata);
  linear.rows = static_cast<int>(rows);
  linear.inputs = static_cast<int>(inputs);
  linear.padded_rows = static_cast<int>(padded_rows);
  linear.padded_inputs = static_cast<int>(padded_inputs);
  return linear;
}

// What the router chose, contiguous.
Tensor check_routes(const Tensor& routes, const Tensor& x, ScalarType dtype, const char* name,
                    const char* rule) {
  STD_TORCH_CHECK(routes.is_cuda() && routes.get_device_index() == x.get_device_index() &&
                      routes.scalar_type() == dtype && routes.dim() == 2 &&
                      routes.size(0) == x.size(0) && routes.size(1) > 0,
                  name, " of shape ", shape(routes), " must be ", rule, " [", x.size(0),
                  ", choices] on the GPU of x, with one choice at least.");
  return routes.is_contiguous() ? routes : torch::stable::contiguous(routes);
}

Tensor sparse_experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor gate_up,
                      Tensor gate_up_metadata, OptionalTensor gate_up_permutation,
                      OptionalTensor gate_up_scale, Tensor down, Tensor down_metadata,
                      OptionalTensor down_permutation, OptionalTensor down_scale,
                      int64_t intermediate_size, int64_t activation) {
  STD_TORCH_CHECK(x.is_cuda(), "x of shape ", shape(x),
                  " is not on a GPU, the experts are: move it there.");
  ExpertsArguments arguments{};
  arguments.element = element_of(x);
  arguments.activation = checked_activation(activation);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0 && x.size(1) % 8 == 0, "x of shape ", shape(x),
                  " must be [tokens, in], with inputs that are a multiple of 8.");
  STD_TORCH_CHECK(intermediate_size > 0 && intermediate_size % 8 == 0, "intermediate_size is ",
                  intermediate_size, ": the inputs of down, a multiple of 8.");
  const int64_t hidden = x.size(1), tokens = x.size(0), experts = gate_up.size(0);
  STD_TORCH_CHECK(experts > 0 && experts <= kMostExperts, "gate_up of shape ", shape(gate_up),
                  " has ", experts, " experts: from 1 to ", kMostExperts, " at a time.");
  const Tensor weights =
      check_routes(topk_weights, x, ScalarType::Float, "topk_weights", "float32");
  const Tensor ids = check_routes(topk_ids, x, ScalarType::Int, "topk_ids", "int32");
  const int64_t choices = ids.size(1);
  STD_TORCH_CHECK(weights.size(1) == choices, "topk_weights ", shape(weights), " and topk_ids ",
                  shape(ids), " must have the same shape.");
  STD_TORCH_CHECK(tokens * choices <= kMostPairs, "x has ", tokens, " tokens of ", choices,
                  " experts each: at most ", kMostPairs,
                  " pairs at a time. Multiply fewer tokens (vLLM: --max-num-batched-tokens).");
  const int64_t first_outputs = outputs_for_input(arguments.activation) * intermediate_size;
  arguments.gate_up = check_stack(x, gate_up, gate_up_metadata, gate_up_permutation, gate_up_scale,
                                  experts, first_outputs, hidden, "gate_up");
  arguments.down = check_stack(x, down, down_metadata, down_permutation, down_scale, experts,
                               hidden, intermediate_size, "down");
  const int index = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const Device& device = device_of(index);
  Tensor y = empty_on(x, {tokens, hidden}, x.scalar_type(), "the result");
  if (tokens == 0) return y;
  const Tensor rows = readable_rows(x, arguments.x_stride);
  arguments.x = rows.const_data_ptr();
  arguments.tokens = static_cast<int>(tokens);
  arguments.choices = static_cast<int>(choices);
  arguments.experts = static_cast<int>(experts);
  arguments.ids = data<int>(ids);
  arguments.weights = data<float>(weights);
  arguments.y = y.mutable_data_ptr();
  const ExpertsPlan plan = plan_experts(arguments, device);
  Tensor tables = empty_on(ids, {plan.table_ints()}, ScalarType::Int, "the order of pairs");
  const auto rows_of_pairs = [&](int64_t columns, const char* what) {
    return empty_on(x, {plan.pairs, columns}, x.scalar_type(), what);
  };
  Tensor gathered = rows_of_pairs(hidden, "the activations of experts");
  Tensor gate_ups = rows_of_pairs(first_outputs, "the products of gate and up");
  Tensor gated = rows_of_pairs(intermediate_size, "the activations of down");
  arguments.tables = tables_at(static_cast<int*>(tables.mutable_data_ptr()), plan);
  arguments.gathered = gathered.mutable_data_ptr();
  arguments.gate_ups = gate_ups.mutable_data_ptr();
  arguments.gated = gated.mutable_data_ptr();
  arguments.outputs = gathered.mutable_data_ptr();  // which nothing reads any more
  check(multiply_experts(arguments, plan, device, current_stream(index)),
        "the kernels for experts");
  return y;
}

}  // namespace
}  // namespace permllm::cuda

// permllm::sparse_experts itself is defined in permllm_vllm/ops.py.
STABLE_TORCH_LIBRARY_IMPL(permllm, CUDA, m) {
  m.impl("sparse_experts", TORCH_BOX(&permllm::cuda::sparse_experts));
}
