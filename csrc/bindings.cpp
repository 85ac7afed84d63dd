// The operators that Python sees. Every check of caller's input is here; the kernels check nothing.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "cpu/linear.h"
#include "cpu/packing/pack.h"
#include "cpu_tensors.h"

namespace permllm {
namespace {

// ----------------------------------------------------------------------------------------------
// pack

void check_permutation(const Tensor& permutation, int64_t k, int64_t block_size) {
  check_dtype(permutation, ScalarType::Byte, "permutation", "uint8, local to its block");
  STD_TORCH_CHECK(permutation.numel() == k && k % block_size == 0, "permutation of shape ",
                  shape(permutation), " does not fit ", k, " inputs in blocks of ", block_size,
                  ": it needs one entry per input and whole blocks.");
  const auto* p = data<uint8_t>(permutation);
  for (int64_t first = 0; first < k; first += block_size) {
    uint64_t seen = 0;
    for (int64_t j = 0; j < block_size; ++j) {
      if (p[first + j] < block_size) seen |= uint64_t{1} << p[first + j];
    }
    STD_TORCH_CHECK(__builtin_popcountll(seen) == block_size, "permutation of inputs ", first, "..",
                    first + block_size - 1, " is no bijection of 0..", block_size - 1,
                    ": the checkpoint is corrupted.");
  }
}

// Packs a checkpoint's tensors for the instruction set `isa` ("": that of cpu_instruction_set). Of
// every `group` inputs each row keeps half.
// Returns the blocks and their header, which sparse_linear takes as `packed` and `metadata`.
std::tuple<Tensor, Tensor> cpu_pack(Tensor values, Tensor mask, OptionalTensor permutation,
                                    int64_t block_size, std::string isa_name, int64_t group) {
  const cpu::Isa isa = cpu::select(isa_name);
  const bool int8 = values.scalar_type() == ScalarType::Char;
  const auto type = int8 ? cpu::ValueType::kInt8 : cpu::ValueType::kBfloat16;
  if (!int8) check_dtype(values, ScalarType::BFloat16, "values", "bfloat16 or int8 [out, in / 2]");
  STD_TORCH_CHECK(cpu::has_kernel(isa, type), "instruction set ", cpu::name(isa),
                  " has no kernel for ",
                  int8 ? "int8 values: scale them to bfloat16 before packing."
                       : "bfloat16 values: pack for avx512, avx2 or portable.");
  check_dtype(mask, ScalarType::Byte, "mask", "uint8 [out, in / 8]");
  STD_TORCH_CHECK(values.dim() == 2 && mask.dim() == 2, "values ", shape(values), " and mask ",
                  shape(mask), " must have two dimensions, [out, in / 2] and [out, in / 8].");
  const int64_t n = values.size(0);
  const int64_t k = values.size(1) * 2;
  STD_TORCH_CHECK(n > 0 && k > 0 && n < kLargestSize && k < kLargestSize && k % 8 == 0, "values ",
                  shape(values), " describe a weight of ", n, " x ", k,
                  ": both must be positive and the inputs a multiple of 8.");
  STD_TORCH_CHECK(!int8 || k <= cpu::kInt8Inputs, "int8 values of ", k, " inputs: at most ",
                  cpu::kInt8Inputs,
                  " can be summed exactly, scale them to bfloat16 before packing.");
  STD_TORCH_CHECK(mask.size(0) == n && mask.size(1) == k / 8, "mask ", shape(mask),
                  " does not fit values ", shape(values), ": it must be [", n, ", ", k / 8, "].");
  STD_TORCH_CHECK(!permutation.has_value() ||
                      (cpu::undoes_permutation(isa) && (block_size == 32 || block_size == 64)),
                  "block size ", block_size, " on ", cpu::name(isa),
                  ": the permutation cannot be undone inside blocks of 64 inputs: pack without it "
                  "and give it to sparse_linear.");
  STD_TORCH_CHECK(
      group > 0 && group <= cpu::kBlockInputs && group % 4 == 0 && cpu::kBlockInputs % group == 0,
      "group of ", group,
      " inputs: a row must keep half of every 4, 8, 16, 32 or 64, as its pattern says.");
  const Tensor contiguous_values = in_one_piece(values);
  const Tensor contiguous_mask = in_one_piece(mask);
  Tensor contiguous_permutation;
  cpu::PackArguments arguments{contiguous_values.const_data_ptr(),
                               type,
                               data<uint8_t>(contiguous_mask),
                               nullptr,
                               block_size,
                               group,
                               n,
                               k};
  if (permutation.has_value()) {
    contiguous_permutation = in_one_piece(*permutation);
    check_permutation(contiguous_permutation, k, block_size);
    arguments.permutation = data<uint8_t>(contiguous_permutation);
  }

  const cpu::Packing packing = cpu::choose_packing(isa, arguments);
  Tensor packed = huge_bytes(packing.layout.bytes());
  const cpu::BadMask bad = cpu::pack(packing, arguments, packed.mutable_data_ptr());
  STD_TORCH_CHECK(bad.row < 0, "mask of row ", bad.row, " keeps ", bad.kept, " of the inputs ",
                  bad.input, "..", bad.input + bad.inputs - 1,
                  ", not half of them: the checkpoint is corrupted.");

  return {packed, metadata_of(packing.layout)};
}

// ---------------------------------------------------------------------------------------------
// linear

cpu::PackedLayout check_packed(const Tensor& packed, const OptionalTensor& metadata,
                               int64_t out_features) {
  STD_TORCH_CHECK(metadata.has_value() && metadata->scalar_type() == ScalarType::Long &&
                      metadata->is_cpu() && metadata->numel() == cpu::header::kSize &&
                      metadata->is_contiguous(),
                  "metadata must be the int64 header that cpu_pack returned beside packed.");
  const cpu::PackedLayout weight = checked_layout(data<int64_t>(*metadata));
  STD_TORCH_CHECK(weight.n == out_features, "packed has ", weight.n, " outputs, out_features is ",
                  out_features, ": they must agree.");
  const int64_t bytes = weight.bytes();
  STD_TORCH_CHECK(packed.is_cpu() && packed.is_contiguous() && packed.numel() == bytes,
                  "packed has ", packed.numel(), " bytes, its metadata describe ", bytes,
                  ": it was truncated or replaced. Pack again from the checkpoint.");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 64 == 0,
                  "packed is not aligned to 64 bytes: use the tensor that cpu_pack returned, or a "
                  "clone of it.");
  return weight;
}

// Multiplies with checked arguments; bias and y have the type of x.
template <class Real>
void multiply(const cpu::PackedLayout& weight, const Tensor& x, const Tensor& packed,
              const OptionalTensor& permutation, const OptionalTensor& scale,
              const OptionalTensor& bias, Tensor& y) {
  const bool strided_rows = x.dim() == 2 && x.stride(1) == 1;
  const Tensor rows = strided_rows ? x : in_one_piece(x);
  cpu::LinearOf<Real> arguments{};
  arguments.x = data<Real>(rows);
  arguments.x_stride = strided_rows ? x.stride(0) : weight.k;
  arguments.m = x.numel() / weight.k;
  arguments.packed = packed.const_data_ptr();
  arguments.n = weight.n;
  arguments.k = weight.k;
  arguments.bias = bias.has_value() ? data<Real>(*bias) : nullptr;
  arguments.y = static_cast<Real*>(y.mutable_data_ptr());
  arguments.behind = weight.behind(packed.const_data_ptr());
  if (scale.has_value()) arguments.scale = data<float>(*scale);
  cpu::linear(weight.isa, weight.type, arguments,
              permutation.has_value() ? data<int32_t>(*permutation) : nullptr);
}

Tensor sparse_linear(Tensor x, Tensor packed, OptionalTensor metadata, OptionalTensor permutation,
                     OptionalTensor scale, OptionalTensor bias, int64_t out_features,
                     std::string /*pattern*/) {
  if (packed.scalar_type() != ScalarType::Byte)
    return dense_product(x, packed, bias);  // the reference backend's
  const cpu::PackedLayout weight = check_packed(packed, metadata, out_features);
  check_activations(x, weight);
  const bool int8 = cpu::in_int8(weight.type);
  STD_TORCH_CHECK(
      scale.has_value() == int8, "scale is ", int8 ? "missing" : "given",
      ": packed int8 values need the scale of the checkpoint, bfloat16 values have none.");
  if (int8) {
    check_dtype(*scale, ScalarType::Float, "scale", "float32 [out]");
    STD_TORCH_CHECK(scale->numel() == weight.n, "scale of shape ", shape(*scale), " does not fit ",
                    weight.n, " outputs.");
    scale = in_one_piece(*scale);
  }
  if (bias.has_value()) {
    check_dtype(*bias, x.scalar_type(), "bias", "[out] in the dtype of x");
    STD_TORCH_CHECK(bias->numel() == weight.n, "bias of shape ", shape(*bias), " does not fit ",
                    weight.n, " outputs.");
    bias = in_one_piece(*bias);
  }
  if (permutation.has_value()) {
    check_dtype(*permutation, ScalarType::Int, "permutation", "int32 [in], absolute input indices");
    STD_TORCH_CHECK(permutation->numel() == weight.k && permutation->is_contiguous(),
                    "permutation ", shape(*permutation), " does not fit ", weight.k,
                    " inputs: it must be contiguous [", weight.k, "].");
    check_gather(data<int32_t>(*permutation), weight.k);
  }

  Tensor y = empty_result(x, weight.n);
  if (x.numel() == 0) return y;
  const auto run = x.scalar_type() == ScalarType::BFloat16 ? multiply<cpu::bf16>
                   : x.scalar_type() == ScalarType::Half   ? multiply<cpu::fp16>
                                                           : multiply<float>;
  run(weight, x, packed, permutation, scale, bias, y);
  return y;
}

// The name of the instruction set that serves here: the fastest, or the one in PERMLLM_CPU_ISA. One
// with kernels for int8 values alone leaves bfloat16 values to the next.
std::string cpu_instruction_set() { return cpu::name(cpu::select("")); }

// Whether int8 values can be packed for this instruction set as they are.
bool cpu_packs_int8(std::string isa) {
  return cpu::has_kernel(cpu::select(isa), cpu::ValueType::kInt8);
}

// Every instruction set that this CPU and build run, fastest first, separated by commas.
std::string cpu_instruction_sets() { return cpu::supported_names(); }

}  // namespace
}  // namespace permllm

// permllm::sparse_linear itself is defined in permllm_vllm/ops.py, with or without this library.
STABLE_TORCH_LIBRARY_FRAGMENT(permllm, m) {
  m.def(
      "cpu_pack(Tensor values, Tensor mask, Tensor? permutation, int block_size, str isa, "
      "int group=8) -> (Tensor, Tensor)");
  m.def("cpu_instruction_set() -> str");
  m.def("cpu_instruction_sets() -> str");
  m.def("cpu_packs_int8(str isa) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(permllm, CPU, m) {
  m.impl("sparse_linear", TORCH_BOX(&permllm::sparse_linear));
  m.impl("cpu_pack", TORCH_BOX(&permllm::cpu_pack));
}

STABLE_TORCH_LIBRARY_IMPL(permllm, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&permllm::cpu_instruction_set));
  m.impl("cpu_instruction_sets", TORCH_BOX(&permllm::cpu_instruction_sets));
  m.impl("cpu_packs_int8", TORCH_BOX(&permllm::cpu_packs_int8));
}
