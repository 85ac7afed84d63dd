// What the operators on the CPU ask of their tensors, and make of them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>

#include "cpu/pack.h"
#include "cpu/weight_memory.h"
#include "tensors.h"

namespace permllm {
namespace {

constexpr int64_t kMostDimensions = 64;  // of x, as of many operators of PyTorch

// The tensor, or a contiguous copy. To ask PyTorch is nine allocations where there is nothing to
// do.
inline Tensor in_one_piece(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline void check_dtype(const Tensor& tensor, ScalarType dtype, const char* what,
                        const char* rule) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == dtype, what, " of shape ",
                  shape(tensor), " is not a CPU tensor of the right dtype: it must be ", rule, ".");
}

// Bytes of weight_memory.h.
inline Tensor huge_bytes(int64_t bytes) {
  const std::array<int64_t, 1> sizes{bytes}, strides{1};
  return torch::stable::from_blob(cpu::allocate_weight(bytes), sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  ScalarType::Byte,
                                  [bytes](void* memory) { cpu::release_weight(memory, bytes); });
}

// The header of a packed weight (layout.h).
inline Tensor metadata_of(const cpu::PackedLayout& layout) {
  const std::array<int64_t, 1> size{cpu::header::kSize};
  Tensor metadata = torch::stable::empty(size, ScalarType::Long);
  auto* header = static_cast<int64_t*>(metadata.mutable_data_ptr());
  header[cpu::header::kLayout] = cpu::kLayoutVersion;
  header[cpu::header::kIsa] = static_cast<int64_t>(layout.isa);
  header[cpu::header::kRows] = cpu::rows(layout.isa);
  header[cpu::header::kOutputs] = layout.n;
  header[cpu::header::kInputs] = layout.k;
  header[cpu::header::kValues] = static_cast<int64_t>(layout.type);
  header[cpu::header::kStrays] = layout.strays;
  return metadata;
}

// What x @ W^T goes to: as x, but n to a row. By the C function, because torch::stable::empty boxes
// its arguments for the dispatcher, seven allocations more.
inline Tensor empty_result(const Tensor& x, int64_t n) {
  std::array<int64_t, kMostDimensions> sizes, strides;
  int64_t stride = 1;
  for (int64_t i = x.dim() - 1; i >= 0; --i) {
    sizes[i] = i == x.dim() - 1 ? n : x.size(i);
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  const StableIValue dtype = torch::stable::detail::from(x.scalar_type());
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(x.dim(), sizes.data(), strides.data(),
                                                  torch::stable::detail::to<int32_t>(dtype),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace
}  // namespace permllm
