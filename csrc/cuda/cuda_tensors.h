// What the operators on NVIDIA GPUs ask of their tensors, of CUDA and of PyTorch.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <exception>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "../tensors.h"
#include "kernels.h"

namespace permllm::cuda {
namespace {

constexpr int64_t kMostTokens = int64_t{1} << 30;
constexpr int kLeastCapability = 80;

inline bool aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

inline void check(int error, const char* what) {
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

inline const Device& device_of(int index) {
  static std::mutex mutex;
  static std::map<int, Device> devices;
  const std::lock_guard lock(mutex);
  auto entry = devices.find(index);
  if (entry == devices.end()) {
    Device device{};
    check(describe_device(index, device), "reading the properties of the GPU");
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
inline void* current_stream(int device_index) {
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

inline Tensor empty_on(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype,
                       const char* what) {
  int64_t bytes = dtype == ScalarType::Float ? 4 : static_cast<int64_t>(like.element_size());
  for (const int64_t size : sizes) bytes *= size;
  return allocated(bytes, what,
                   [&] { return torch::stable::empty(sizes, dtype, std::nullopt, like.device()); });
}

// The same elements in memory of their own, aligned and without gaps.
inline Tensor copied(const Tensor& tensor, const char* what) {
  const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
  return allocated(bytes, what, [&] {
    const Tensor contiguous = torch::stable::contiguous(tensor);
    return aligned(contiguous) ? contiguous : torch::stable::clone(contiguous);
  });
}

inline void check_part(const Tensor& tensor, const Tensor& x, ScalarType dtype, int64_t elements,
                       const char* name, const char* rule) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index() &&
                      tensor.scalar_type() == dtype && tensor.numel() == elements &&
                      tensor.is_contiguous() && aligned(tensor),
                  name, " of shape ", shape(tensor), " must be ", elements, " contiguous ", rule,
                  " on the GPU of x, aligned to 16 bytes: use what the CUDA backend packed.");
}

inline void check_extent(const Tensor& packed, int64_t padded_rows, int64_t padded_inputs,
                         const char* name) {
  STD_TORCH_CHECK(padded_rows <= kMostRows && padded_inputs <= kMostInputs, name, " of shape ",
                  shape(packed), " has more than ", kMostRows, " outputs or more than ",
                  kMostInputs,
                  " inputs, the most that the CUDA kernels multiply: split the layer.");
}

inline ElementType element_of(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "x of shape ",
                  shape(x),
                  " is neither bfloat16 nor float16, the types that the CUDA kernels compute in: "
                  "load the model with dtype bfloat16.");
  return dtype == ScalarType::Half ? ElementType::kFloat16 : ElementType::kBFloat16;
}

// x with rows that the kernels can read 16 bytes at a time, and their distance. Rows that overlap
// are copied: TMA takes none.
inline Tensor readable_rows(const Tensor& x, int64_t& stride) {
  stride = x.size(-1);
  if (x.dim() == 2 && x.stride(1) == 1 && x.stride(0) % 8 == 0 && x.stride(0) >= x.size(1) &&
      aligned(x)) {
    stride = x.stride(0);
    return x;
  }
  return copied(x, "a copy of the activations");
}

}  // namespace
}  // namespace permllm::cuda
