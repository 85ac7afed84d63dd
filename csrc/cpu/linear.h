// y = x @ W^T + bias for a packed W: the one place that chooses a kernel.
#pragma once

#include "isa.h"
#include "kernels.h"

namespace permllm::cpu {

// Runs the kernel of this instruction set and token count. With `gather` (absolute input indices
// [k], all of them in 0..k-1) the kernel sees x[:, gather] instead of x.
void linear(Isa isa, LinearArguments arguments, const int32_t* gather);

}  // namespace permllm::cpu
