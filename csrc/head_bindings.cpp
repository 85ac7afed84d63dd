// The operators of the output head, which stays dense.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "cpu/dense.h"
#include "cpu_tensors.h"

namespace permllm {
namespace {

// x @ W^T. As many tokens as a kernel takes meet the rows where they stand; more are PyTorch's.
Tensor head_linear(Tensor x, Tensor weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && x.dim() >= 1 && x.dim() <= kMostDimensions &&
                      x.size(-1) == weight.size(1),
                  "x of shape ", shape(x), " does not fit a weight of shape ", shape(weight),
                  ": the last dimension of both must be the inputs, and x has at most ",
                  kMostDimensions, " dimensions.");
  const int64_t n = weight.size(0), k = weight.size(1);
  const int64_t m = k > 0 ? x.numel() / k : 0;
  const ScalarType dtype = x.scalar_type();
  const bool half = dtype == ScalarType::Half;
  const bool words = x.is_cpu() && weight.is_cpu() && weight.scalar_type() == dtype &&
                     (half || dtype == ScalarType::BFloat16);
  const bool in_place = weight.is_contiguous() && k % cpu::kDenseInputs == 0 &&
                        reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 64 == 0;
  cpu::DenseKernel kernel;
  if (words && in_place && m > 0 && n > 0) kernel = cpu::dense_kernel(n, k, half);
  if (kernel.tokens == 0 || m > kernel.tokens) return dense_product(x, weight, std::nullopt);
  const Tensor rows = in_one_piece(x);
  Tensor y = empty_result(x, n);
  cpu::LinearArguments arguments{};
  arguments.x = data<cpu::bf16>(rows);
  arguments.x_stride = k;
  arguments.m = m;
  arguments.packed = weight.const_data_ptr();
  arguments.n = n;
  arguments.k = k;
  arguments.y = static_cast<cpu::bf16*>(y.mutable_data_ptr());
  arguments.half = half;
  cpu::dense_linear(kernel, arguments);
  return y;
}

// No bytes, for `packed` where nothing is packed.
Tensor no_bytes() {
  const std::array<int64_t, 1> none{0};
  return torch::stable::empty(none, ScalarType::Byte);
}

// Packs int8 values of dense rows as they are.
std::tuple<Tensor, Tensor> pack_rounded(const Tensor& weight, cpu::Isa isa) {
  const cpu::PackedLayout layout{isa, cpu::ValueType::kDense8, weight.size(0), weight.size(1)};
  if (!cpu::has_kernel(isa, layout.type) || layout.k > cpu::kDense8Inputs) {
    return {no_bytes(), metadata_of(layout)};
  }
  const Tensor rows = in_one_piece(weight);
  Tensor packed = huge_bytes(layout.bytes());
  cpu::pack_dense_int8(layout, data<int8_t>(rows), packed.mutable_data_ptr());
  return {packed, metadata_of(layout)};
}

// Packs a dense weight for the instruction set `isa` ("": the one that serves here): bfloat16 in 12
// bits, int8 as it is. Returns what cpu_pack does, or no bytes where no kernel reads that, or too
// many values have no place in it.
std::tuple<Tensor, Tensor> cpu_pack_dense(Tensor weight, std::string isa_name) {
  const bool int8 = weight.scalar_type() == ScalarType::Char;
  if (!int8) check_dtype(weight, ScalarType::BFloat16, "weight", "bfloat16 or int8 [out, in]");
  STD_TORCH_CHECK(
      weight.is_cpu() && weight.dim() == 2 && weight.numel() > 0 && weight.size(1) % 8 == 0,
      "weight of shape ", shape(weight),
      " must be [out, in] on the CPU, neither of them 0 and in a multiple of 8.");
  const cpu::Isa isa = cpu::select(isa_name);
  if (int8) return pack_rounded(weight, isa);
  const Tensor rows = in_one_piece(weight);
  const auto* values = data<cpu::bf16>(rows);
  const cpu::Packing packing =
      cpu::choose_dense_packing(isa, values, weight.size(0), weight.size(1));
  const bool dense = packing.layout.type == cpu::ValueType::kDense12;
  Tensor packed = dense ? huge_bytes(packing.layout.bytes()) : no_bytes();
  if (dense) cpu::pack_dense(packing, values, packed.mutable_data_ptr());
  return {packed, metadata_of(packing.layout)};
}

// How many tokens head_linear multiplies itself at most with a weight [outputs, inputs], 0 where it
// has no kernel: of bfloat16, or with `half` of float16.
int64_t cpu_head_tokens(int64_t outputs, int64_t inputs, bool half) {
  return cpu::dense_kernel(outputs, inputs, half).tokens;
}

// Up to how many tokens a copy in 12 bits of such a weight is multiplied faster than the weight
// itself, as long as head_linear multiplies that at all.
int64_t cpu_head_copied_tokens(int64_t outputs, int64_t inputs, bool half) {
  return cpu::dense_kernel(outputs, inputs, half).copied_tokens;
}

// `bytes` bytes in huge pages, the content undefined.
Tensor cpu_huge_bytes(int64_t bytes) {
  STD_TORCH_CHECK(bytes > 0, bytes, " bytes asked for: there must be at least one.");
  return huge_bytes(bytes);
}

}  // namespace
}  // namespace permllm

// permllm::head_linear itself is defined in permllm_vllm/ops.py, with or without this library.
STABLE_TORCH_LIBRARY_FRAGMENT(permllm, m) {
  m.def("cpu_head_tokens(int outputs, int inputs, bool half=False) -> int");
  m.def("cpu_head_copied_tokens(int outputs, int inputs, bool half=False) -> int");
  m.def("cpu_huge_bytes(int bytes) -> Tensor");
  m.def("cpu_pack_dense(Tensor weight, str isa) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(permllm, CPU, m) {
  m.impl("head_linear", TORCH_BOX(&permllm::head_linear));
  m.impl("cpu_pack_dense", TORCH_BOX(&permllm::cpu_pack_dense));
}

STABLE_TORCH_LIBRARY_IMPL(permllm, CompositeExplicitAutograd, m) {
  m.impl("cpu_head_tokens", TORCH_BOX(&permllm::cpu_head_tokens));
  m.impl("cpu_head_copied_tokens", TORCH_BOX(&permllm::cpu_head_copied_tokens));
  m.impl("cpu_huge_bytes", TORCH_BOX(&permllm::cpu_huge_bytes));
}
