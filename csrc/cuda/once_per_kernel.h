// Something to be done once for every kernel on every GPU. No header of CUDA: tested on the host.
#pragma once

#include <mutex>
#include <set>
#include <utility>

namespace permllm::cuda {

class OncePerKernel {
 public:
  // Runs `action`, which returns 0 or an error, where it has not yet returned 0 for this kernel and
  // GPU, in one thread at a time: when a call returns 0, it has been done.
  template <class Action>
  int operator()(const void* kernel, int device, const Action& action) {
    const std::lock_guard lock(mutex_);
    if (done_.count({kernel, device}) > 0) return 0;
    const int error = action();
    if (error == 0) done_.emplace(kernel, device);
    return error;
  }

 private:
  std::mutex mutex_;
  std::set<std::pair<const void*, int>> done_;
};

}  // namespace permllm::cuda
