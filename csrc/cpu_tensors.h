// What the operators on the CPU ask of their tensors, and make of them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>

#include "cpu/linear.h"
#include "cpu/memory/weight_memory.h"
#include "cpu/packing/pack.h"
#include "tensors.h"

namespace permllm {
namespace {

constexpr int64_t kLargestSize = int64_t{1} << 31;  // of n and k: byte counts then fit 64 bits
constexpr int64_t kMostDimensions = 64;             // of x, as of many operators of PyTorch

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
  header[cpu::header::kRows] = layout.rows();
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

// The layout that the header of a packed weight describes, if this build and CPU can read it.
inline cpu::PackedLayout checked_layout(const int64_t* header) {
  const auto isa = static_cast<cpu::Isa>(header[cpu::header::kIsa]);
  const auto type = static_cast<cpu::ValueType>(header[cpu::header::kValues]);
  const cpu::PackedLayout weight{isa, type, header[cpu::header::kOutputs],
                                 header[cpu::header::kInputs], header[cpu::header::kStrays]};
  STD_TORCH_CHECK(header[cpu::header::kLayout] == cpu::kLayoutVersion,
                  "metadata has layout version ", header[cpu::header::kLayout],
                  ", this build reads ", cpu::kLayoutVersion, ": pack again from the checkpoint.");
  STD_TORCH_CHECK(cpu::supported(isa), "packed was written for instruction set ", cpu::name(isa),
                  ", this CPU or build runs only: ", cpu::supported_names(),
                  ". Pack again from the checkpoint.");
  STD_TORCH_CHECK(
      type == cpu::ValueType::kBfloat16 || cpu::in_int8(type) || cpu::in_twelve_bits(type) ||
          cpu::in_lanes(type),
      "metadata is corrupted: value type ", header[cpu::header::kValues],
      " is neither bfloat16 (0, in lanes 5 and 7), int8 (1, in lanes 6 and 8, in 4 "
      "bits 9 to 11, in groups 13 and 14, dense 4) nor "
      "bfloat16 in 12 bits (2, in groups 12, dense 3). Pack again from the checkpoint.");
  STD_TORCH_CHECK(cpu::has_kernel(isa, type), "packed was written for a kernel of instruction set ",
                  cpu::name(isa), " that this build lacks. Pack again from the checkpoint.");
  STD_TORCH_CHECK(header[cpu::header::kRows] == weight.rows() && weight.n > 0 && weight.k > 0 &&
                      weight.n < kLargestSize && weight.k < kLargestSize && weight.k % 8 == 0 &&
                      weight.strays >= 0 && weight.strays <= weight.most_strays(),
                  "metadata is corrupted: ", header[cpu::header::kRows], " rows per block, ",
                  weight.n, " x ", weight.k, " weight, ", weight.strays,
                  " of its values in a list. Pack again from the checkpoint.");
  return weight;
}

// Absolute input indices [k].
inline void check_gather(const int32_t* permutation, int64_t k) {
  uint32_t largest = 0;  // as unsigned, a negative index is a large one
  for (int64_t i = 0; i < k; ++i) {
    largest = std::max(largest, static_cast<uint32_t>(permutation[i]));
  }
  STD_TORCH_CHECK(largest < k, "permutation holds the input index ", static_cast<int32_t>(largest),
                  ", outside 0..", k - 1, ".");
}

inline void check_activation_dtype(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(x.is_cpu() && (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                                 dtype == ScalarType::Float),
                  "x of shape ", shape(x),
                  " is not a CPU tensor of the right dtype: it must be bfloat16, float16 or "
                  "float32.");
}

inline void check_activations(const Tensor& x, const cpu::PackedLayout& weight) {
  check_activation_dtype(x);
  STD_TORCH_CHECK(
      x.scalar_type() != ScalarType::Float || cpu::takes_float32(weight.isa, weight.type),
      "x is float32, packed was written for instruction set ", cpu::name(weight.isa),
      ", whose kernel for such values takes bfloat16 and float16: ",
      cpu::is_dense(weight.type) ? "convert x to one of them."
                                 : "pack for avx512, avx2 or portable.");
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) == weight.k, "x of shape ", shape(x), " does not fit ",
                  weight.k, " inputs: its last dimension must be ", weight.k, ".");
  STD_TORCH_CHECK(x.dim() <= kMostDimensions, "x has ", x.dim(), " dimensions, at most ",
                  kMostDimensions, " are taken: flatten all but the last.");
}

}  // namespace
}  // namespace permllm
