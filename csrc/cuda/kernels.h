// The kernels as the bindings call them: plain C++, no header of CUDA. All return a cudaError_t and
// run on `stream`, a cudaStream_t of the current device.
#pragma once

#include <cstddef>

#include "arguments.h"
#include "mma_plan.h"

namespace permllm::cuda {

// Fills `device` for the device of this index.
int describe_device(int index, Device& device);
// Of the current device.
int free_memory(size_t& bytes);
const char* error_text(int error);

// Whether an error means that this build has no code for the GPU.
bool built_for_others(int error);

// Whether it means that the driver is older than the toolkit of this build.
bool newer_than_driver(int error);

// On every GPU, for any number of tokens. `partial` is float32 [plan.splits][tokens][padded_rows],
// or null where plan.splits is 1.
int mma_linear(const LinearArguments& arguments, const MmaPlan& plan, float* partial, void* stream);

// Where takes_gemm_sm90 is true. x is permuted already, arguments.permutation ignored.
int gemm_sm90(const LinearArguments& arguments, const Device& device, void* stream);

int permute(const PermuteArguments& arguments, void* stream);

}  // namespace permllm::cuda
