// Memory that AddressSanitizer is to report when it is touched. Without that sanitizer, nothing.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace permllm::cpu {

#if defined(__SANITIZE_ADDRESS__)
// Bytes between neighbours in one mapping, more than any vector takes at a time.
constexpr size_t kRedZone = 256;

inline void poison(const void* data, size_t bytes) { __asan_poison_memory_region(data, bytes); }
inline void unpoison(const void* data, size_t bytes) { __asan_unpoison_memory_region(data, bytes); }
#else
constexpr size_t kRedZone = 0;

inline void poison(const void*, size_t) {}
inline void unpoison(const void*, size_t) {}
#endif

}  // namespace permllm::cpu
