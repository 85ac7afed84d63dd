// Memory in 2 MiB pages, for what is read at the rate of memory.
#pragma once

#include <cstddef>

namespace permllm::cpu {

constexpr size_t kHugePage = size_t{2} << 20;

// `bytes` bytes of memory, 64-byte aligned, the content undefined. Throws a std::bad_alloc
// that says how many bytes, and what to do.
//
// From 2 MiB on they are mapped for the caller alone, beginning at a multiple of 2 MiB: every whole
// 2 MiB of them become one page where the system grants it, and lie where the thread that touches
// them first runs. The allocator would hand out again what was touched before, in small pages. What
// is left over at the end has small pages, so nothing is wasted; a block below 2 MiB could have no
// large page and comes from the allocator.
void* allocate_huge(size_t bytes);

// Gives back what allocate_huge returned for as many bytes; null is nothing.
void release_huge(void* data, size_t bytes);

}  // namespace permllm::cpu
