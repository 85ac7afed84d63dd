#include <cuda_runtime.h>

#include "kernels.h"
#include "launch.h"

namespace permllm::cuda {

int describe_device(int index, Device& device) {
  int major = 0, minor = 0;
  const auto read = [index](int& value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(&value, attribute, index);
  };
  cudaError_t error = read(major, cudaDevAttrComputeCapabilityMajor);
  if (error == cudaSuccess) error = read(minor, cudaDevAttrComputeCapabilityMinor);
  if (error == cudaSuccess) error = read(device.processors, cudaDevAttrMultiProcessorCount);
  if (error == cudaSuccess) {
    error = read(device.shared_bytes_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  }
  device.capability = 10 * major + minor;
  device.index = index;
  return told(error);
}

int free_memory(size_t& bytes) {
  size_t all = 0;
  return told(cudaMemGetInfo(&bytes, &all));
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

bool built_for_others(int error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
}

bool newer_than_driver(int error) {
  return error == cudaErrorInsufficientDriver || error == cudaErrorCallRequiresNewerDriver ||
         error == cudaErrorUnsupportedPtxVersion;
}

}  // namespace permllm::cuda
