// What is done once per kernel and GPU, called by many threads.
#include "once_per_kernel.h"

#include <atomic>
#include <thread>
#include <vector>

extern "C" {

// Threads that each call for every kernel on every GPU, `repeats` times; the first `failures` calls
// of the action fail. Returns the errors that the threads saw, and how often the action ran in
// `ran`; -1 where a call returned 0 before the action had been done.
int run_once_per_kernel(int threads, int kernels, int devices, int repeats, int failures,
                        int* ran) {
  permllm::cuda::OncePerKernel once;
  std::atomic<int> calls = 0, errors = 0;
  std::vector<std::atomic<int>> done(kernels * devices);
  std::atomic<bool> early = false;
  std::vector<char> names(kernels);
  std::vector<std::thread> running;
  for (int thread = 0; thread < threads; ++thread) {
    running.emplace_back([&] {
      for (int i = 0; i < repeats * kernels * devices; ++i) {
        const int kernel = i % kernels, device = i / kernels % devices;
        const int error = once(&names[kernel], device, [&] {
          if (calls++ < failures) return 7;
          std::this_thread::yield();
          ++done[kernel * devices + device];
          return 0;
        });
        errors += error == 7;
        if (error == 0 && done[kernel * devices + device] != 1) early = true;
      }
    });
  }
  for (std::thread& thread : running) thread.join();
  *ran = calls;
  return early ? -1 : static_cast<int>(errors);
}
}
