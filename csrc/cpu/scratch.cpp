#include "scratch.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace permllm::cpu {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kGrowth = size_t{64} << 10;

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[kScratchKinds];

}  // namespace

void* allocate_huge(size_t bytes) {
  const bool huge = bytes >= kHugePage;
  void* data = nullptr;
  if (posix_memalign(&data, huge ? kHugePage : 64, bytes) != 0) throw std::bad_alloc();
  if (huge) madvise(data, bytes, MADV_HUGEPAGE);  // advice: small pages are slower, not wrong
  return data;
}

void* thread_scratch(Scratch kind, size_t bytes) {
  Buffer& buffer = buffers[static_cast<int>(kind)];
  if (buffer.bytes < bytes) {
    const size_t rounded = (bytes + kGrowth - 1) / kGrowth * kGrowth;
    std::free(buffer.data);
    buffer.data = nullptr;
    buffer.bytes = 0;
    buffer.data = allocate_huge(rounded);
    buffer.bytes = rounded;
  }
  return buffer.data;
}

}  // namespace permllm::cpu
