// Starts a kernel, so that it may overlap with the one before it.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>

#include "arguments.h"

namespace permllm::cuda {

// Kernels wait for the previous one (device.h) where they are compiled for sm_90 or later. A build
// for older GPUs alone also runs on new ones, from PTX that does not wait: it must not overlap.
constexpr bool waits_for_previous_kernel() {
  for (const int architecture : {__CUDA_ARCH_LIST__}) {
    if (architecture >= 900) return true;
  }
  return false;
}

template <class... Parameters, class... Values>
int launch(void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes,
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
  configuration.gridDim = dim3(grid.x, grid.y, grid.z);
  configuration.blockDim = dim3(threads);
  configuration.dynamicSmemBytes = shared_bytes;
  configuration.stream = static_cast<cudaStream_t>(stream);
  configuration.attrs = &overlap;
  configuration.numAttrs = device.capability >= 90 && waits_for_previous_kernel() ? 1 : 0;
  return cudaLaunchKernelEx(&configuration, kernel, Parameters(values)...);
}

}  // namespace permllm::cuda
