// The operators of linear layers on NVIDIA GPUs. Every check of caller's input is here; the kernels
// check nothing.
//
// libtorch's stable ABI only, and no symbol of CUDA's libtorch at link time: the library is built
// with, and loads in, a PyTorch for the CPU too.
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "cuda_tensors.h"

namespace permllm::cuda {
namespace {

// The sizes and the weight's pointers. x and y are filled in by the caller.
LinearArguments check_arguments(const Tensor& x, const Tensor& packed, const Tensor& metadata,
                                const OptionalTensor& permutation, const OptionalTensor& scale,
                                const OptionalTensor& bias, int64_t rows,
                                const std::string& pattern) {
  LinearArguments arguments{};
  arguments.element = element_of(x);
  STD_TORCH_CHECK(pattern == "2:4", "pattern ", pattern,
                  " has no CUDA kernel, 2:4 has: prune with it, or serve on the CPU.");
  STD_TORCH_CHECK(packed.dim() == 2 && packed.size(0) > 0 && packed.size(0) % kRowMultiple == 0 &&
                      packed.size(1) > 0 && packed.size(1) % (kInputMultiple / 2) == 0,
                  "packed of shape ", shape(packed),
                  " must be [out, in / 2], padded to multiples of 128 and 64: use what the CUDA "
                  "backend packed.");
  const int64_t padded_rows = packed.size(0);
  const int64_t padded_inputs = packed.size(1) * 2;
  check_extent(packed, padded_rows, padded_inputs, "packed");
  STD_TORCH_CHECK(rows > 0 && round_up(rows, kRowMultiple) == padded_rows, "out_features is ", rows,
                  ", packed has ", padded_rows, " padded outputs: they must agree.");
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0 && x.size(-1) % 8 == 0 &&
                      round_up(x.size(-1), kInputMultiple) == padded_inputs,
                  "x of shape ", shape(x), " does not fit packed ", shape(packed),
                  ": its last dimension must be the inputs of the layer, a multiple of 8: pass "
                  "activations of the layer that packed was made from.");
  const int64_t tokens = x.numel() / x.size(-1);
  STD_TORCH_CHECK(tokens < kMostTokens, "x of shape ", shape(x), " has ", tokens,
                  " tokens: less than 2^30 at a time.");
  arguments.int8 = packed.scalar_type() == ScalarType::Char;
  check_part(packed, x, arguments.int8 ? ScalarType::Char : x.scalar_type(),
             padded_rows * padded_inputs / 2, "packed", "values of the dtype of x, or int8,");
  check_part(metadata, x, ScalarType::Byte, padded_rows * padded_inputs / 8, "metadata", "uint8");
  if (permutation.has_value()) {
    check_part(*permutation, x, ScalarType::Byte, padded_inputs, "permutation", "uint8");
    arguments.permutation = data<uint8_t>(*permutation);
  }
  STD_TORCH_CHECK(scale.has_value() == arguments.int8, "scale is ",
                  scale.has_value() ? "there" : "missing", " but packed is ",
                  arguments.int8 ? "int8" : "not int8", ": pass what the CUDA backend packed.");
  if (scale.has_value()) {
    check_part(*scale, x, ScalarType::Float, rows, "scale", "float32");
    arguments.scale = data<float>(*scale);
  }
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->is_cuda() && bias->get_device_index() == x.get_device_index() &&
                        bias->scalar_type() == x.scalar_type() && bias->numel() == rows &&
                        bias->is_contiguous(),
                    "bias of shape ", shape(*bias), " must be ", rows,
                    " contiguous elements of the dtype of x, on its GPU.");
    arguments.bias = bias->const_data_ptr();
  }
  arguments.values = packed.const_data_ptr();
  arguments.metadata = data<uint8_t>(metadata);
  arguments.tokens = static_cast<int>(tokens);
  arguments.rows = static_cast<int>(rows);
  arguments.inputs = static_cast<int>(x.size(-1));
  arguments.padded_rows = static_cast<int>(padded_rows);
  arguments.padded_inputs = static_cast<int>(padded_inputs);
  return arguments;
}

// By what build.py defines.
#ifdef PERMLLM_SM90
constexpr bool kHasGemmSm90 = true;
#else
constexpr bool kHasGemmSm90 = false;
#endif

Tensor sparse_linear(Tensor x, Tensor packed, OptionalTensor metadata, OptionalTensor permutation,
                     OptionalTensor scale, OptionalTensor bias, int64_t out_features,
                     std::string pattern) {
  if (!metadata.has_value()) return dense_product(x, packed, bias);
  STD_TORCH_CHECK(x.is_cuda(), "x of shape ", shape(x),
                  " is not on a GPU, packed is: move it there.");
  if (bias.has_value() && !aligned(*bias)) bias = torch::stable::clone(*bias);
  LinearArguments arguments =
      check_arguments(x, packed, *metadata, permutation, scale, bias, out_features, pattern);
  const int index = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const Device& device = device_of(index);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out_features;
  Tensor y = empty_on(x, sizes, x.scalar_type(), "the result");
  if (arguments.tokens == 0) return y;
  void* stream = current_stream(index);
  Tensor rows = readable_rows(x, arguments.x_stride);
  arguments.x = rows.const_data_ptr();
  arguments.y = y.mutable_data_ptr();

  if (takes_a_pass(arguments)) {
    Tensor permuted = empty_on(x, {arguments.tokens, arguments.inputs}, x.scalar_type(),
                               "the permuted activations");
    const PermuteArguments permute_arguments{rows.const_data_ptr(), arguments.x_stride,
                                             arguments.permutation, permuted.mutable_data_ptr(),
                                             arguments.tokens,      arguments.inputs};
    check(permute(permute_arguments, stream), "the permutation kernel");
    rows = permuted;
    arguments.x = rows.const_data_ptr();
    arguments.x_stride = arguments.inputs;
    arguments.permutation = nullptr;
  }
  if constexpr (kHasGemmSm90) {
    if (takes_gemm_sm90(arguments, device)) {
      check(gemm_sm90(arguments, device, stream), "the sparse GEMM");
      return y;
    }
  }
  const MmaPlan plan = plan_mma(arguments, device);
  OptionalTensor partial;
  if (plan.splits > 1) {
    partial = empty_on(x, {plan.splits, arguments.tokens, arguments.padded_rows}, ScalarType::Float,
                       "the partial sums");
  }
  float* sums = partial ? static_cast<float*>(partial->mutable_data_ptr()) : nullptr;
  check(mma_linear(arguments, plan, sums, stream), "the product by mma.sp");
  return y;
}

// x[..., j] = x[..., j - j % 128 + permutation[j]], for elements of 2 bytes.
Tensor permute_inputs(Tensor x, Tensor permutation) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() >= 1 && x.element_size() == 2 && x.size(-1) > 0 &&
                      x.size(-1) % 8 == 0 && x.size(-1) <= kMostInputs,
                  "x of shape ", shape(x), " and ", x.element_size(),
                  " bytes per element: it must be on a GPU, of bfloat16 or float16, with rows of a "
                  "multiple of 8 inputs, at most ",
                  kMostInputs, ".");
  const int64_t columns = x.size(-1);
  STD_TORCH_CHECK(permutation.is_cuda() && permutation.get_device_index() == x.get_device_index() &&
                      permutation.scalar_type() == ScalarType::Byte &&
                      permutation.numel() >= columns && permutation.is_contiguous(),
                  "permutation of shape ", shape(permutation), " must be uint8 with an entry for ",
                  columns, " inputs, on the GPU of x.");
  const int index = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  device_of(index);  // whether there are kernels for it
  const Tensor rows = copied(x, "a copy of the activations");
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  Tensor y = empty_on(x, sizes, x.scalar_type(), "the permuted activations");
  const PermuteArguments arguments{rows.const_data_ptr(),      columns,
                                   data<uint8_t>(permutation), y.mutable_data_ptr(),
                                   x.numel() / columns,        columns};
  if (arguments.tokens == 0) return y;
  check(permute(arguments, current_stream(index)), "the permutation kernel");
  return y;
}

// The architectures that this build has kernels for, as nvcc names them, separated by blanks.
std::string cuda_architectures() { return PERMLLM_CUDA_ARCHITECTURES; }

}  // namespace
}  // namespace permllm::cuda

// permllm::sparse_linear and permute_inputs themselves are defined in permllm_vllm/ops.py.
STABLE_TORCH_LIBRARY_FRAGMENT(permllm, m) { m.def("cuda_architectures() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(permllm, CUDA, m) {
  m.impl("sparse_linear", TORCH_BOX(&permllm::cuda::sparse_linear));
  m.impl("permute_inputs", TORCH_BOX(&permllm::cuda::permute_inputs));
}

STABLE_TORCH_LIBRARY_IMPL(permllm, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&permllm::cuda::cuda_architectures));
}
