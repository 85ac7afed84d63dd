// launch.h and device.cu with a CUDA runtime that is only pretended: what launches return, and what
// they leave.
#define __CUDA_ARCH_LIST__ 800, 900
#include "device.cu"
#include "launch.h"

namespace {

int last = 0;         // the runtime's last error
bool sticky = false;  // a kernel has failed: every call does from then on
int next = 0;         // what the next call fails with
int launches = 0;
int attributes = 0;  // of the last launch
int capability = 0;
int driver = 0;
int bound = -1;      // the GPU whose context this thread has
int bind_error = 0;  // what binding it fails with

int call() {
  const int error = sticky ? last : next;
  next = 0;
  if (error != 0) last = error;
  return error;
}

void kernel(int) {}

permllm::cuda::Device device{90, 132, 227 << 10, 228 << 10, 3, false};

}  // namespace

extern "C" {

cudaError_t cudaGetLastError() {
  const int error = last;
  if (!sticky) last = 0;
  return static_cast<cudaError_t>(error);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* configuration, const void*, void**) {
  ++launches;
  attributes = static_cast<int>(configuration->numAttrs);
  return static_cast<cudaError_t>(call());
}
cudaError_t cudaSetDevice(int index) {
  if (bind_error != 0) return static_cast<cudaError_t>(last = bind_error);
  bound = index;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return static_cast<cudaError_t>(call());
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? capability / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? capability % 10
                                                            : 1 << 10;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t*, size_t*) { return static_cast<cudaError_t>(call()); }
const char* cudaGetErrorString(cudaError_t) { return ""; }

int is_newer_than_driver(int error) { return permllm::cuda::newer_than_driver(error); }

// Launches on a GPU and with a driver such as these from now on; whether kernels may overlap there.
int describe(int capability_of, int driver_of, int overlap) {
  capability = capability_of;
  driver = driver_of;
  if (permllm::cuda::describe_device(3, overlap != 0, device) != 0) return -1;
  return device.overlaps;
}
int launched_to_overlap() { return attributes; }

// Sets what has happened before: an error that is still there, of a kernel or of a call.
void begin(int error, int of_kernel, int next_error) {
  last = error;
  sticky = of_kernel != 0;
  next = next_error;
  bound = -1;
  bind_error = 0;
}
void refuse_to_bind(int error) { bind_error = error; }
int left() { return last; }
int launched() { return launches; }

int launch_ours(int shared_bytes) {
  return permllm::cuda::launch(kernel, {1}, 32, shared_bytes, device, nullptr, 0);
}

// As CUTLASS does: it launches, takes the last error away and says whether there was none.
int launch_cutlass() {
  return permllm::cuda::launch_by_cutlass(device, [] {
    if (bound != device.index) return false;  // nothing to encode in
    ++launches;
    const int error = call();
    return cudaGetLastError() == cudaSuccess && error == 0;
  });
}
}
