// C interface for operators.py: what csrc/bindings.cpp does for amx, without its checks. Packing
// and the choice of a kernel are those of csrc/cpu, where the emulation counts as supported.
#include <algorithm>
#include <cstdlib>

#include "cpu/experts/experts.h"
#include "cpu/linear.h"
#include "cpu/packing/pack.h"

namespace permllm::cpu {

// linear.cpp names it; nothing is packed for it here.
void portable(const LinearOf<bf16>&, Worker&) { std::abort(); }
void portable(const LinearOf<fp16>&, Worker&) { std::abort(); }
void portable(const LinearOf<float>&, Worker&) { std::abort(); }

namespace {

PackedLayout layout_of(int64_t type, int64_t strays, int64_t n, int64_t k) {
  return {select("amx"), static_cast<ValueType>(type), n, k, strays};
}

template <class Real>
void multiply_one(const PackedLayout& layout, const void* x, int64_t x_stride, int64_t m,
                  const void* packed, const void* bias, const float* scale, const int32_t* gather,
                  void* y) {
  const LinearOf<Real> arguments{static_cast<const Real*>(x),
                                 x_stride,
                                 m,
                                 packed,
                                 layout.n,
                                 layout.k,
                                 static_cast<const Real*>(bias),
                                 static_cast<Real*>(y),
                                 scale,
                                 layout.behind(packed)};
  linear(layout.isa, layout.type, arguments, gather);
}

template <class Real>
void multiply_all(const void* x, int64_t x_stride, int64_t tokens, const StackedLinear& gate_up,
                  const StackedLinear& down, permllm::Activation activation, void* y,
                  const Routing& routing) {
  multiply_experts<Real>({static_cast<const Real*>(x), x_stride, tokens, gate_up, down, activation,
                          static_cast<Real*>(y)},
                         routing);
}

}  // namespace
}  // namespace permllm::cpu

using namespace permllm::cpu;

extern "C" {

bool packs_int8() { return has_kernel(select("amx"), ValueType::kInt8); }

int64_t packed_size(int64_t type, int64_t strays, int64_t n, int64_t k) {
  return layout_of(type, strays, n, k).bytes();
}

// The type that values of `type` are packed as; writes how many of them are strays.
int64_t packed_type(int64_t type, const void* values, int64_t n, int64_t k, int64_t* strays) {
  const PackedLayout layout = layout_of(type, 0, n, k);
  const PackArguments arguments{values, layout.type, nullptr, nullptr, 0, kBlockInputs, n, k};
  const PackedLayout chosen = choose_packing(layout.isa, arguments).layout;
  *strays = chosen.strays;
  return static_cast<int64_t>(chosen.type);
}

// The first row with a bad mask, or -1.
int64_t pack_weight(int64_t type, const void* values, const uint8_t* mask,
                    const uint8_t* permutation, int64_t block_size, int64_t group, int64_t n,
                    int64_t k, void* packed) {
  const PackedLayout layout = layout_of(type, 0, n, k);
  const PackArguments arguments{values, layout.type, mask, permutation, block_size, group, n, k};
  return pack(choose_packing(layout.isa, arguments), arguments, packed).row;
}

void pack_dense_weight(const int8_t* rows, int64_t n, int64_t k, void* packed) {
  pack_dense_int8(layout_of(static_cast<int64_t>(ValueType::kDense8), 0, n, k), rows, packed);
}

void multiply_packed(int64_t type, int64_t strays, bool half, const void* x, int64_t x_stride,
                     int64_t m, const void* packed, int64_t n, int64_t k, const void* bias,
                     const float* scale, const int32_t* gather, void* y) {
  (half ? multiply_one<fp16> : multiply_one<bf16>)(layout_of(type, strays, n, k), x, x_stride, m,
                                                   packed, bias, scale, gather, y);
}

int64_t header_fields() { return header::kSize; }

void write_header(int64_t type, int64_t strays, int64_t n, int64_t k, int64_t* fields) {
  const PackedLayout layout = layout_of(type, strays, n, k);
  const int64_t written[] = {kLayoutVersion,
                             static_cast<int64_t>(layout.isa),
                             rows(layout.isa),
                             n,
                             k,
                             static_cast<int64_t>(layout.type),
                             strays};
  static_assert(sizeof(written) == header::kSize * sizeof(int64_t));
  std::copy_n(written, header::kSize, fields);
}

void multiply_stacked(bool half, const void* x, int64_t x_stride, int64_t tokens,
                      const float* weights, const int32_t* ids, int64_t choices, int64_t experts,
                      const StackedLinear* gate_up, const StackedLinear* down, int64_t activation,
                      void* y) {
  const Routing routing = route(ids, weights, tokens, choices, experts);
  (half ? multiply_all<fp16> : multiply_all<bf16>)(x, x_stride, tokens, *gate_up, *down,
                                                   static_cast<permllm::Activation>(activation), y,
                                                   routing);
}

}  // extern "C"
