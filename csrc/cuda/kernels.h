// The kernels as the bindings call them: plain C++, no header of CUDA. All return a cudaError_t and
// run on `stream`, a cudaStream_t of the current device.
#pragma once

#include <cstddef>

#include "arguments.h"
#include "experts.h"
#include "few_tokens_plan.h"

namespace permllm::cuda {

// Fills `device` for the device of this index; kernels overlap there where `overlap` allows it too.
int describe_device(int index, bool overlap, Device& device);
// Of the current device.
int free_memory(size_t& bytes);
const char* error_text(int error);

// Whether an error means that this build has no code for the GPU.
bool built_for_others(int error);

// Whether it means that the driver is older than the toolkit of this build.
bool newer_than_driver(int error);

// Any number of tokens, with splits at most kMostBlocks. `partial` is float32
// [plan.splits][tokens][padded_rows], or null where plan.splits is 1.
int few_tokens(const LinearArguments& arguments, const FewTokensPlan& plan, float* partial,
               const Device& device, void* stream);

// Any number of tokens, in tiles of `tile`; x is permuted already, arguments.permutation ignored.
int many_tokens_mma(const LinearArguments& arguments, int tile, const Device& device, void* stream);

// The same on sm_90 and sm_100, for 16-bit values and rows % 8 == 0.
int many_tokens_sm90_bfloat16(const LinearArguments& arguments, int tile, const Device& device,
                              void* stream);
int many_tokens_sm90_float16(const LinearArguments& arguments, int tile, const Device& device,
                             void* stream);
// These permute x by arguments.permutation, which is there.
int many_tokens_sm90_permuting_bfloat16(const LinearArguments& arguments, int tile,
                                        const Device& device, void* stream);
int many_tokens_sm90_permuting_float16(const LinearArguments& arguments, int tile,
                                       const Device& device, void* stream);
int many_tokens_sm100_bfloat16(const LinearArguments& arguments, int tile, const Device& device,
                               void* stream);
int many_tokens_sm100_float16(const LinearArguments& arguments, int tile, const Device& device,
                              void* stream);

// Any number of tokens, with memory for as many pairs and blocks as the plan says.
int multiply_experts(const ExpertsArguments& arguments, const ExpertsPlan& plan,
                     const Device& device, void* stream);

int permute(const PermuteArguments& arguments, int element_bytes, const Device& device,
            void* stream);

}  // namespace permllm::cuda
