// The operators on NVIDIA GPUs. Every check of caller's input is here; the kernels check nothing.
//
// libtorch's stable ABI only, and no symbol of CUDA's libtorch at link time: the library is built
// with, and loads in, a PyTorch for the CPU too.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <cstdlib>
#include <exception>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "../tensors.h"
#include "kernel_choice.h"
#include "kernels.h"
#include "many_tokens.h"

namespace permllm::cuda {
namespace {

constexpr int64_t kMostTokens = int64_t{1} << 30;
constexpr int kLeastCapability = 80;

bool aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

void check(int error, const char* what) {
  STD_TORCH_CHECK(error == 0, what, " failed: ", error_text(error),
                  built_for_others(error)
                      ? ". This build has kernels for the architectures " PERMLLM_CUDA_ARCHITECTURES
                        ": set PERMLLM_CUDA_ARCHS to that of this GPU, and install again."
                  : newer_than_driver(error)
                      ? ". The kernels were built with a CUDA toolkit newer than the driver: "
                        "install again with one no newer than the CUDA version that nvidia-smi "
                        "shows, or update the driver."
                      : ".");
}

// Whether kernels may overlap: PERMLLM_CUDA_PDL, after programmatic dependent launch.
bool overlap_allowed() {
  const char* value = std::getenv("PERMLLM_CUDA_PDL");
  const std::string choice = value != nullptr ? value : "";
  STD_TORCH_CHECK(choice.empty() || choice == "0" || choice == "1", "PERMLLM_CUDA_PDL=", choice,
                  " is neither 0 nor 1: give 0 so that every kernel waits until the one before has "
                  "ended, or unset it.");
  return choice != "0";
}

const Device& device_of(int index) {
  static std::mutex mutex;
  static std::map<int, Device> devices;
  const std::lock_guard lock(mutex);
  auto entry = devices.find(index);
  if (entry == devices.end()) {
    Device device{};
    check(describe_device(index, overlap_allowed(), device), "reading the properties of the GPU");
    entry = devices.emplace(index, device).first;
  }
  STD_TORCH_CHECK(entry->second.capability >= kLeastCapability, "GPU ", index,
                  " has compute capability ", entry->second.capability / 10, ".",
                  entry->second.capability % 10,
                  "; sparse tensor cores need 8.0 or later. Serve the dense model on it.");
  return entry->second;
}

// PyTorch's current stream. The function is in CUDA's libtorch alone, which Python loads privately:
// it is found in that library by name, not among the symbols that everybody sees.
void* current_stream(int device_index) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library != nullptr ? dlsym(library, kName) : nullptr;
    if (symbol == nullptr) symbol = dlsym(RTLD_DEFAULT, kName);
    return reinterpret_cast<Function>(symbol);
  }();
  STD_TORCH_CHECK(function != nullptr,
                  "this PyTorch has no aoti_torch_get_current_cuda_stream: install PyTorch 2.11 or "
                  "later for CUDA.");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device_index, &stream));
  return stream;
}

// What `allocate` returns, which takes memory on the current GPU. PyTorch's errors lose their type
// in the stable ABI, and their text before 2.13: torch.OutOfMemoryError cannot be raised, but its
// first words can be said.
template <class Allocate>
Tensor allocated(int64_t bytes, const char* what, const Allocate& allocate) {
  try {
    return allocate();
  } catch (const std::exception&) {
    size_t free = 0;
    check(free_memory(free), "asking for memory");  // where a kernel has failed before, say that
    STD_TORCH_CHECK(false, "CUDA out of memory: ", what, " of a sparse layer takes ", bytes,
                    " bytes, and ", free,
                    " are free beside what PyTorch holds: multiply fewer tokens at a time, or "
                    "leave more memory free (vLLM: --max-num-batched-tokens, "
                    "--gpu-memory-utilization).");
  }
}

Tensor empty_on(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype,
                const char* what) {
  int64_t bytes = dtype == ScalarType::Float ? 4 : static_cast<int64_t>(like.element_size());
  for (const int64_t size : sizes) bytes *= size;
  return allocated(bytes, what,
                   [&] { return torch::stable::empty(sizes, dtype, std::nullopt, like.device()); });
}

// The same elements in memory of their own, aligned and without gaps.
Tensor copied(const Tensor& tensor, const char* what) {
  const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
  return allocated(bytes, what, [&] {
    const Tensor contiguous = torch::stable::contiguous(tensor);
    return aligned(contiguous) ? contiguous : torch::stable::clone(contiguous);
  });
}

void check_part(const Tensor& tensor, const Tensor& x, ScalarType dtype, int64_t elements,
                const char* name, const char* rule) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index() &&
                      tensor.scalar_type() == dtype && tensor.numel() == elements &&
                      tensor.is_contiguous() && aligned(tensor),
                  name, " of shape ", shape(tensor), " must be ", elements, " contiguous ", rule,
                  " on the GPU of x, aligned to 16 bytes: use what the CUDA backend packed.");
}

ElementType element_of(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "x of shape ",
                  shape(x),
                  " is neither bfloat16 nor float16, the types that the CUDA kernels compute in: "
                  "load the model with dtype bfloat16.");
  return dtype == ScalarType::Half ? ElementType::kFloat16 : ElementType::kBFloat16;
}

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
  STD_TORCH_CHECK(padded_rows <= kMostRows && padded_inputs * 2 <= kMostRowBytes,
                  "packed of shape ", shape(packed), " has more than ", kMostRows,
                  " outputs or more than ", kMostRowBytes / 2,
                  " inputs, the most that the CUDA kernels multiply: split the layer.");
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

// x with rows that the kernels can read 16 bytes at a time, and their distance.
Tensor readable_rows(const Tensor& x, int64_t& stride) {
  stride = x.size(-1);
  if (x.dim() == 2 && x.stride(1) == 1 && x.stride(0) % 8 == 0 && x.stride(0) > 0 && aligned(x)) {
    stride = x.stride(0);
    return x;
  }
  return copied(x, "a copy of the activations");
}

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

  const LinearKernel kernel = choose_kernel(arguments, device, kBuilt);
  if (takes_a_pass(kernel, arguments, device)) {
    Tensor permuted = empty_on(x, {arguments.tokens, arguments.inputs}, x.scalar_type(),
                               "the permuted activations");
    const PermuteArguments permute_arguments{rows.const_data_ptr(), arguments.x_stride,
                                             arguments.permutation, permuted.mutable_data_ptr(),
                                             arguments.tokens,      arguments.inputs};
    check(permute(permute_arguments, 2, device, stream), "the permutation kernel");
    rows = permuted;
    arguments.x = rows.const_data_ptr();
    arguments.x_stride = arguments.inputs;
    arguments.permutation = nullptr;
  }
  if (kernel == LinearKernel::kFewTokens) {
    const FewTokensPlan plan = plan_few_tokens(arguments, device);
    OptionalTensor partial;
    if (plan.splits > 1) {
      partial = empty_on(x, {plan.splits, arguments.tokens, arguments.padded_rows},
                         ScalarType::Float, "the partial sums");
    }
    float* sums = partial ? static_cast<float*>(partial->mutable_data_ptr()) : nullptr;
    check(few_tokens(arguments, plan, sums, device, stream), "the kernel for few tokens");
    return y;
  }
  check(many_tokens(kernel, arguments, device, stream), "the kernel for many tokens");
  return y;
}

// x[..., j] = x[..., j - j % 128 + permutation[j]], for elements of 1, 2 or 4 bytes.
Tensor permute_inputs(Tensor x, Tensor permutation) {
  const int64_t element_bytes = x.element_size();
  STD_TORCH_CHECK(x.is_cuda() && x.dim() >= 1 && x.size(-1) > 0 &&
                      (element_bytes == 1 || element_bytes == 2 || element_bytes == 4) &&
                      x.size(-1) * element_bytes % 16 == 0,
                  "x of shape ", shape(x), " and ", element_bytes,
                  " bytes per element: it must be on a GPU, with elements of 1, 2 or 4 bytes and "
                  "rows of a multiple of 16 bytes.");
  const int64_t columns = x.size(-1);
  STD_TORCH_CHECK(columns * element_bytes <= kMostRowBytes, "x of shape ", shape(x),
                  " has rows of ", columns * element_bytes, " bytes: at most ", kMostRowBytes,
                  " at a time; split them.");
  STD_TORCH_CHECK(permutation.is_cuda() && permutation.get_device_index() == x.get_device_index() &&
                      permutation.scalar_type() == ScalarType::Byte &&
                      permutation.numel() >= columns && permutation.is_contiguous(),
                  "permutation of shape ", shape(permutation), " must be uint8 with an entry for ",
                  columns, " inputs, on the GPU of x.");
  const int index = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const Device& device = device_of(index);
  const Tensor rows = copied(x, "a copy of the activations");
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  Tensor y = empty_on(x, sizes, x.scalar_type(), "the permuted activations");
  const PermuteArguments arguments{rows.const_data_ptr(),      columns,
                                   data<uint8_t>(permutation), y.mutable_data_ptr(),
                                   x.numel() / columns,        columns};
  if (arguments.tokens == 0) return y;
  check(permute(arguments, static_cast<int>(element_bytes), device, current_stream(index)),
        "the permutation kernel");
  return y;
}

// The architectures that this build has kernels for, as nvcc names them, separated by blanks.
std::string cuda_architectures() { return PERMLLM_CUDA_ARCHITECTURES; }

// Those whose own GEMM for many tokens, of CUTLASS, this build has; the same way.
std::string cutlass_architectures() {
  std::string names = kBuilt.sm90 ? "90" : "";
  if (kBuilt.sm100) names += names.empty() ? "100" : " 100";
  return names;
}

}  // namespace
}  // namespace permllm::cuda

// permllm::sparse_linear and permute_inputs themselves are defined in permllm_vllm/ops.py.
STABLE_TORCH_LIBRARY_FRAGMENT(permllm, m) {
  m.def("cuda_architectures() -> str");
  m.def("cutlass_architectures() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(permllm, CUDA, m) {
  m.impl("sparse_linear", TORCH_BOX(&permllm::cuda::sparse_linear));
  m.impl("permute_inputs", TORCH_BOX(&permllm::cuda::permute_inputs));
}

STABLE_TORCH_LIBRARY_IMPL(permllm, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&permllm::cuda::cuda_architectures));
  m.impl("cutlass_architectures", TORCH_BOX(&permllm::cuda::cutlass_architectures));
}
