// Memory of packed weights and of the output head: side by side in 2 MiB pages, which they share.
#pragma once

#include <cstddef>

namespace permllm::cpu {

// `bytes` bytes of memory, 64-byte aligned, the content undefined. Throws std::bad_alloc.
//
// A weight follows the one before it, so that the end of a large weight and all of a small one lie
// in 2 MiB pages too, where the system grants them: small pages are read at half the rate. Pages
// lie where the thread that touches them first runs. Addresses are mapped 256 MiB at a time, and as
// long as nothing is released at most one page of memory of them is wasted. What is released leaves
// its addresses unused until all of the 256 MiB are free, and of memory the parts of the two pages
// at its ends that neighbours share.
void* allocate_weight(size_t bytes);

// Gives back what allocate_weight returned for as many bytes, and with it every page that no other
// weight lies in; null is nothing.
void release_weight(void* data, size_t bytes);

}  // namespace permllm::cpu
