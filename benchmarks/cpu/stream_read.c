/* Reads memory as fast as one core can: a sum of all its words, which comes out wrong where a byte
 * is left out. The hardware's own prefetching stops at pages of 4 KiB; `hint` and `ahead` fetch
 * further. */
#include <stddef.h>
#include <stdint.h>

enum { LINE = 64, MOST_LINES = 8, WORDS = LINE / sizeof(uint64_t) };
typedef uint64_t Line __attribute__((vector_size(LINE)));

#define READ(lines, fetch)                                                  \
  for (const char *end = from + bytes; from != end; from += LINE * lines) { \
    _Pragma("GCC unroll 8") for (int i = 0; i < lines; ++i) {               \
      const char *line = from + LINE * i;                                   \
      fetch;                                                                \
      sums[i] += *(const Line *)line;                                       \
    }                                                                       \
  }

#define READ_WITH(hint, lines)                         \
  if (hint == 0) {                                     \
    READ(lines, (void)0)                               \
  } else if (hint == 1) {                              \
    READ(lines, __builtin_prefetch(line + ahead, 0, 3)) \
  } else {                                             \
    READ(lines, __builtin_prefetch(line + ahead, 0, 2)) \
  }

/* The sum of the 64-bit words of `bytes` bytes, a multiple of 512 from a cache line on. A turn of
 * the loop reads `lines` lines, 4 or 8. `hint` is 0 for no prefetch, 1 for one into L1, 2 into L2,
 * of what lies `ahead` bytes further. */
uint64_t stream_read(const char *from, size_t bytes, int lines, int hint, size_t ahead) {
  Line sums[MOST_LINES] = {};
  if (lines == 4) {
    READ_WITH(hint, 4)
  } else {
    READ_WITH(hint, 8)
  }
  uint64_t sum = 0;
  for (int i = 0; i < MOST_LINES; ++i) {
    for (int w = 0; w < (int)WORDS; ++w) sum += sums[i][w];
  }
  return sum;
}
