// Starts a kernel, so that it may overlap with the one before it.
#pragma once

#include <cuda_runtime.h>

#include "arguments.h"

namespace permllm::cuda {

// The kernel calls wait_for_previous_kernel (device.h) where it is compiled for sm_90 or later.
template <class... Parameters, class... Values>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
           const Device& device, void* stream, const Values&... values) {
  constexpr int kAlwaysAllowed = 48 << 10;
  if (shared_bytes > kAlwaysAllowed) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = grid;
  configuration.blockDim = dim3(threads);
  configuration.dynamicSmemBytes = shared_bytes;
  configuration.stream = static_cast<cudaStream_t>(stream);
  configuration.attrs = &overlap;
  configuration.numAttrs = device.capability >= 90 ? 1 : 0;
  return cudaLaunchKernelEx(&configuration, kernel, Parameters(values)...);
}

}  // namespace permllm::cuda
