// Counts what is asked of the allocator, in a process that preloads this library.
//
// From `LARGE` bytes on a request is counted apart: tensors and buffers are larger, what PyTorch
// makes for every call of an operator is smaller.
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>

#define LARGE 512

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

static atomic_long all, large;

static void count(size_t bytes) {
  ++all;
  if (bytes >= LARGE) ++large;
}

long count_all(void) { return all; }
long count_large(void) { return large; }

void* malloc(size_t bytes) {
  count(bytes);
  return __libc_malloc(bytes);
}

void* calloc(size_t items, size_t bytes) {
  count(items * bytes);
  return __libc_calloc(items, bytes);
}

void* realloc(void* data, size_t bytes) {
  count(bytes);
  return __libc_realloc(data, bytes);
}

void* memalign(size_t alignment, size_t bytes) {
  count(bytes);
  return __libc_memalign(alignment, bytes);
}

void* aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }

int posix_memalign(void** data, size_t alignment, size_t bytes) {
  *data = memalign(alignment, bytes);
  return *data == NULL ? ENOMEM : 0;
}
