// Tells which thread first touches each page of a packed weight, in a process that preloads this
// library: of memory mapped while it watches, or of pages that are closed again.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PAGE = 4096, MOST_PAGES = 1 << 17, HUGE_PAGE = 2 << 20 };

static int watching;
static char *first_page, *end_page;
static int thread_of[MOST_PAGES];

static int is_watched(const char *address) { return address >= first_page && address < end_page; }

static void on_fault(int signal, siginfo_t *info, void *context) {
  char *address = info->si_addr;
  if (!is_watched(address)) {
    sigaction(SIGSEGV, &(struct sigaction){.sa_handler = SIG_DFL}, 0);
    return;
  }
  int *thread = &thread_of[(address - first_page) / PAGE], nobody = 0;
  __atomic_compare_exchange_n(thread, &nobody, (int)syscall(SYS_gettid), 0, __ATOMIC_RELAXED,
                              __ATOMIC_RELAXED);
  mprotect((char *)((uintptr_t)address / PAGE * PAGE), PAGE, PROT_READ | PROT_WRITE);
}

// From now on no page of this memory has been touched.
void watch_pages(char *first, size_t bytes) {
  memset(thread_of, 0, sizeof(thread_of));
  first_page = first;
  end_page = first + bytes;
  mprotect(first, bytes, PROT_NONE);
}

// The next mapping as large as those that packed weights share.
void watch_mapping(void) {
  sigaction(SIGSEGV, &(struct sigaction){.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO}, 0);
  watching = 1;
}

// By page, the number of the thread that touched it, 0 for nobody.
const int *threads(const char *address) {
  return is_watched(address) ? thread_of + (address - first_page) / PAGE : 0;
}

void *mmap(void *address, size_t bytes, int rights, int flags, int file, off_t offset) {
  static void *(*map)(void *, size_t, int, int, int, off_t);
  if (map == 0) *(void **)&map = dlsym(RTLD_NEXT, "mmap");
  void *data = map(address, bytes, rights, flags, file, offset);
  if (!watching || file != -1 || bytes < HUGE_PAGE || bytes > (size_t)MOST_PAGES * PAGE) return data;
  watching = 0;
  watch_pages(data, bytes);
  return data;
}
