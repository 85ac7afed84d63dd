// Starts a kernel, so that it may overlap with the one before it.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>

#include "arguments.h"
#include "once_per_kernel.h"

namespace permllm::cuda {

// Kernels wait for the previous one (device.h) where they are compiled for sm_90 or later. A build
// for older GPUs alone also runs on new ones, from PTX that does not wait: it must not overlap.
constexpr bool waits_for_previous_kernel() {
  for (const int architecture : {__CUDA_ARCH_LIST__}) {
    if (architecture >= 900) return true;
  }
  return false;
}

// An error also stays behind as CUDA's last one, where the next that asks for it, CUTLASS among
// them, would take it for its own. Takes it away, as its caller has been told. That of a kernel
// that has failed stays: nothing runs on this GPU any more.
inline int told(int error) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

// Allows a kernel as much shared memory as a block of the GPU can have, so that whichever plan
// comes next needs no call of its own. A no-op but for the first call that needs it.
template <class... Parameters>
int allow_shared_memory(void (*kernel)(Parameters...), int shared_bytes, const Device& device) {
  constexpr int kAlwaysAllowed = 48 << 10;
  if (shared_bytes <= kAlwaysAllowed) return cudaSuccess;
  static OncePerKernel allowed;
  const auto* function = reinterpret_cast<const void*>(kernel);
  return allowed(function, device.index, [&]() -> int {
    return told(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     device.shared_bytes_per_block));
  });
}

template <class... Parameters, class... Values>
int launch(void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes,
           const Device& device, void* stream, const Values&... values) {
  const int error = allow_shared_memory(kernel, shared_bytes, device);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = dim3(grid.x, grid.y, grid.z);
  configuration.blockDim = dim3(threads);
  configuration.dynamicSmemBytes = shared_bytes;
  configuration.stream = static_cast<cudaStream_t>(stream);
  configuration.attrs = &overlap;
  configuration.numAttrs = device.overlaps && waits_for_previous_kernel() ? 1 : 0;
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
