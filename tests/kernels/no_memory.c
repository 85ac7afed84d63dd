// A process that preloads this library has no memory for aligned blocks of threads beside its first,
// once it is told so.
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

void* __libc_memalign(size_t, size_t);

static atomic_int refusing;

void refuse(int yes) { refusing = yes; }

int posix_memalign(void** data, size_t alignment, size_t bytes) {
  const int first = syscall(SYS_gettid) == getpid();
  *data = refusing && !first ? NULL : __libc_memalign(alignment, bytes);
  return *data == NULL ? ENOMEM : 0;
}
