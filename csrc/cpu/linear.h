// y = x @ W^T + bias for a packed W: the one place that chooses a kernel.
#pragma once

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/threads/region.h"

namespace permllm::cpu {

// True where this build has a kernel of this instruction set for such values.
bool has_kernel(Isa isa, ValueType type);

// True where this kernel takes float32 activations too. All take bfloat16 and float16.
bool takes_float32(Isa isa, ValueType type);

// Runs the kernel of this instruction set, value type and token count. With `gather` (absolute
// input indices [k], all of them in 0..k-1) the kernel sees x[:, gather] instead of x.
template <class Real>
void linear(Isa isa, ValueType type, const LinearOf<Real>& arguments, const int32_t* gather);

// The same inside a region, where several weights are multiplied one after the other: packed_x and
// token_scales are the caller's, who has asked for their sizes.
template <class Real>
void multiply(Isa isa, ValueType type, const LinearOf<Real>& arguments, Worker& worker);
template <class Real>
InputMemory input_memory(Isa isa, ValueType type, int64_t m, int64_t k);

}  // namespace permllm::cpu
