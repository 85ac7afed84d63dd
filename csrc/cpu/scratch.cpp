#include "scratch.h"

#include "huge_pages.h"
#include "poison.h"

namespace permllm::cpu {
namespace {

constexpr size_t kGrowth = size_t{64} << 10;

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { release(); }

  void release() {
    unpoison(data, bytes);
    release_huge(data, bytes);
    data = nullptr;
    bytes = 0;
  }
};

thread_local Buffer buffers[kScratchKinds];

}  // namespace

void* thread_scratch(Scratch kind, size_t bytes) {
  Buffer& buffer = buffers[static_cast<int>(kind)];
  if (buffer.bytes < bytes) {
    const size_t rounded = (bytes + kGrowth - 1) / kGrowth * kGrowth;
    buffer.release();
    buffer.data = allocate_huge(rounded);
    buffer.bytes = rounded;
  }
  unpoison(buffer.data, bytes);
  poison(static_cast<char*>(buffer.data) + bytes, buffer.bytes - bytes);
  return buffer.data;
}

}  // namespace permllm::cpu
