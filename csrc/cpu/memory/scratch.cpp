#include "cpu/memory/scratch.h"

#include "cpu/memory/huge_pages.h"
#include "cpu/memory/poison.h"

namespace permllm::cpu {
namespace {

constexpr size_t kGrowth = size_t{64} << 10;
// From here on a buffer has huge pages alone. The activations of 64 tokens, read anew for every few
// rows, have more small pages than the TLB's first level has entries.
constexpr size_t kHugeFrom = size_t{256} << 10;

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
    const size_t growth = bytes < kHugeFrom ? kGrowth : kHugePage;
    const size_t rounded = (bytes + growth - 1) / growth * growth;
    buffer.release();
    buffer.data = allocate_huge(rounded);
    buffer.bytes = rounded;
  }
  unpoison(buffer.data, bytes);
  poison(static_cast<char*>(buffer.data) + bytes, buffer.bytes - bytes);
  return buffer.data;
}

}  // namespace permllm::cpu
