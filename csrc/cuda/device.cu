#include <cuda_runtime.h>

#include "kernels.h"
#include "launch.h"

namespace permllm::cuda {
namespace {

// griddepcontrol is there from sm_90 on. Earlier drivers know of it, but no edge in a graph that
// means it: what was captured would not be what is launched.
constexpr int kOverlappingCapability = 90;
constexpr int kOverlappingDriver = 12030;

}  // namespace

int describe_device(int index, bool overlap, Device& device) {
  int major = 0, minor = 0, driver = 0;
  const auto read = [index](int& value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(&value, attribute, index);
  };
  cudaError_t error = read(major, cudaDevAttrComputeCapabilityMajor);
  if (error == cudaSuccess) error = read(minor, cudaDevAttrComputeCapabilityMinor);
  if (error == cudaSuccess) error = read(device.processors, cudaDevAttrMultiProcessorCount);
  if (error == cudaSuccess) {
    error = read(device.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  }
  if (error == cudaSuccess) {
    error = read(device.shared_bytes_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  }
  if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
  device.capability = 10 * major + minor;
  device.index = index;
  device.overlaps =
      overlap && device.capability >= kOverlappingCapability && driver >= kOverlappingDriver;
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
