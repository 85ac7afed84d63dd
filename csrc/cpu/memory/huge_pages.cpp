#include "cpu/memory/huge_pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>

namespace permllm::cpu {
namespace {

constexpr size_t kCacheLine = 64;

// Its text is made without the allocator.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(size_t bytes) {
    std::snprintf(text_, sizeof(text_),
                  "the system has no %zu bytes for packed weights or for what the CPU kernels put "
                  "between: end what else takes memory, raise the limit (ulimit -v, that of the "
                  "container), or take a smaller model or fewer tokens at a time "
                  "(--max-num-batched-tokens).",
                  bytes);
  }

  const char* what() const noexcept override { return text_; }

 private:
  char text_[320];
};

uintptr_t round_up(uintptr_t value, uintptr_t unit) { return (value + unit - 1) / unit * unit; }

void unmap(uintptr_t begin, uintptr_t end) {
  if (begin < end) munmap(reinterpret_cast<void*>(begin), end - begin);
}

// Pages of nobody before, from a multiple of 2 MiB on.
void* map(size_t bytes) {
  const uintptr_t whole = round_up(bytes, static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)));
  void* region =
      mmap(nullptr, whole + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (region == MAP_FAILED) throw OutOfMemory(bytes);
  const auto begin = reinterpret_cast<uintptr_t>(region);
  const uintptr_t aligned = round_up(begin, kHugePage);
  unmap(begin, aligned);
  unmap(aligned + whole, begin + whole + kHugePage);
  void* data = reinterpret_cast<void*>(aligned);
  madvise(data, whole, MADV_HUGEPAGE);  // advice: small pages are slower, not wrong
  return data;
}

}  // namespace

void* allocate_huge(size_t bytes) {
  if (bytes >= kHugePage) return map(bytes);
  void* data = nullptr;
  if (posix_memalign(&data, kCacheLine, bytes) != 0) throw OutOfMemory(bytes);
  return data;
}

void release_huge(void* data, size_t bytes) {
  if (bytes < kHugePage) {
    std::free(data);
  } else if (data != nullptr) {
    munmap(data, bytes);
  }
}

}  // namespace permllm::cpu
