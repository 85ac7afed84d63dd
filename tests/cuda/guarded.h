// Memory of a kernel on the emulator.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include "emulated_block.h"

namespace permllm::cuda {

// Bytes that end where accessible memory ends: reading or writing past them is a fault.
class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    const size_t page = sysconf(_SC_PAGESIZE);
    bytes_ = bytes;
    mapped_ = (bytes + page - 1) / page * page + page;
    base_ = static_cast<unsigned char*>(
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) emulator::fail("out of memory");
    mprotect(base_ + mapped_ - page, page, PROT_NONE);
    data = base_ + mapped_ - page - bytes;
    poison();
  }
  Guarded(const void* source, size_t bytes) : Guarded(bytes) {
    if (bytes > 0) std::memcpy(data, source, bytes);
  }
  ~Guarded() { munmap(base_, mapped_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  void poison() { std::memset(data, 0xff, bytes_); }
  unsigned char* data;

 private:
  unsigned char* base_;
  size_t bytes_;
  size_t mapped_;
};

// Runs a kernel whose shared memory is poison at the beginning of each block.
inline void launch_with(Guarded& shared, Grid grid, unsigned threads, unsigned seed,
                        const std::function<void()>& body) {
  emulator::launch(grid, threads, seed, [&] { shared.poison(); }, body);
}

// What `run` throws, null if nothing.
inline const char* error_of(const std::function<void()>& run) {
  static std::string message;
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace permllm::cuda
