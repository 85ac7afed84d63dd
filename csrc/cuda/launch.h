// Starts a kernel, and has CUTLASS start one.
#pragma once

#include <cuda_runtime.h>

#include "arguments.h"

namespace permllm::cuda {

// An error also stays behind as CUDA's last one, where the next that asks for it, CUTLASS among
// them, would take it for its own. Takes it away, as its caller has been told. That of a kernel
// that has failed stays: nothing runs on this GPU any more.
inline int told(int error) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

// Allows a kernel of the current GPU so much shared memory.
inline int allow_shared_memory(const void* kernel, int bytes) {
  constexpr int kAlwaysAllowed = 48 << 10;
  if (bytes <= kAlwaysAllowed) return cudaSuccess;
  return told(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

template <class... Parameters, class... Values>
int launch(void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes, void* stream,
           const Values&... values) {
  const int error = allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = dim3(grid.x, grid.y, grid.z);
  configuration.blockDim = dim3(threads);
  configuration.dynamicSmemBytes = shared_bytes;
  configuration.stream = static_cast<cudaStream_t>(stream);
  return told(cudaLaunchKernelEx(&configuration, kernel, Parameters(values)...));
}

// For CUTLASS, which launches, takes CUDA's last error away and tells only whether there was one:
// `run` returns true where there was none. Returns a cudaError_t.
//
// `run` also has the driver encode what TMA reads, which takes a context of this thread. A new one
// has none: PyTorch sets the device only where it changes. From CUDA 12 on cudaSetDevice binds one.
template <class Run>
int launch_by_cutlass(const Device& device, const Run& run) {
  const int unbound = told(cudaSetDevice(device.index));
  if (unbound != cudaSuccess) return unbound;
  static_cast<void>(cudaGetLastError());  // of another's call, which has returned it
  if (run()) return cudaSuccess;
  const int error = cudaGetLastError();  // still there: of a kernel that has failed before
  return error != cudaSuccess ? error : cudaErrorInvalidConfiguration;
}

}  // namespace permllm::cuda
