#include "scratch.h"

#include "huge_pages.h"

namespace permllm::cpu {
namespace {

constexpr size_t kGrowth = size_t{64} << 10;

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { release_huge(data, bytes); }
};

thread_local Buffer buffers[kScratchKinds];

}  // namespace

void* thread_scratch(Scratch kind, size_t bytes) {
  Buffer& buffer = buffers[static_cast<int>(kind)];
  if (buffer.bytes < bytes) {
    const size_t rounded = (bytes + kGrowth - 1) / kGrowth * kGrowth;
    release_huge(buffer.data, buffer.bytes);
    buffer.data = nullptr;
    buffer.bytes = 0;
    buffer.data = allocate_huge(rounded);
    buffer.bytes = rounded;
  }
  return buffer.data;
}

}  // namespace permllm::cpu
