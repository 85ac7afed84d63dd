// A GPU block on the CPU: runs the kernels' own code, one fibre per thread.
//
// It is hard on the code where hardware may be: warps drift apart between barriers and threads run
// in a random order, an asynchronous copy poisons its target at once and arrives only when its
// thread waits for it, and all shared memory starts poisoned. The previous kernel ends as late as
// it can, when every thread waits for it or for another that does; until then what it may write is
// poison, and what it may read must not be written. Code that synchronises too little gives NaN,
// wrong numbers or an error.
//
// Every barrier and wait knows its line, so that a test can leave one out (`left_out`).
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"

struct Index {
  unsigned x, y, z;
};
// Not inline: a loader would share inline variables among the libraries of one process.
static Index threadIdx, blockIdx;  // of the fibre that runs

namespace permllm::cuda::emulator {

struct Copy {
  unsigned char* target;
  const unsigned char* source;  // null: zeros
};

using WarpOperation = void (*)(void* const* lanes);

struct Fibre {
  ucontext_t context;
  std::vector<unsigned char> stack = std::vector<unsigned char>(256 << 10);
  enum { kReady, kAtBlock, kAtWarp, kAtPreviousKernel, kDone } state = kReady;
  bool has_waited = false;  // for the previous kernel
  WarpOperation operation = nullptr;
  void* operands = nullptr;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;
};

struct Block {
  std::vector<std::unique_ptr<Fibre>> fibres;
  ucontext_t scheduler;
  Fibre* current = nullptr;
  std::function<void()> body;
  std::function<void()> previous_kernel_ends;  // empty once it has ended
  std::mt19937 random;
  std::string error;

  void run(Index index);
};
static Block* block;

inline void leave(decltype(Fibre::kReady) state) {
  Fibre* fibre = block->current;
  fibre->state = state;
  swapcontext(&fibre->context, &block->scheduler);
}

// Ends the launch. A fibre cannot throw through the scheduler: it leaves for good.
[[noreturn]] inline void fail(const char* message) {
  if (block == nullptr || block->current == nullptr) throw std::runtime_error(message);
  block->error = message;
  for (;;) leave(Fibre::kDone);
}

// A barrier or a wait in the kernels' source, in the order in which they were first come to.
struct Site {
  const char* name;
  std::string file;
  unsigned line;
};
static std::vector<Site> sites;
static size_t left_out = SIZE_MAX;  // of `sites`

inline bool leaves_out(const char* name, const std::source_location& where) {
  size_t site = 0;
  while (site < sites.size() &&
         (sites[site].line != where.line() || sites[site].file != where.file_name())) {
    ++site;
  }
  if (site == sites.size()) sites.push_back({name, where.file_name(), where.line()});
  return site == left_out;
}

inline void entry() {
  block->body();
  if (!block->current->open.empty()) fail("copies were never committed");
  if (!block->current->has_waited) fail("a thread never waited for the previous kernel");
  leave(Fibre::kDone);
}

inline void at_warp(WarpOperation operation, void* operands) {
  block->current->operation = operation;
  block->current->operands = operands;
  leave(Fibre::kAtWarp);
}

// Lets barriers and warp operations go on where all their threads have come.
inline bool release(Block& b) {
  bool progress = false;
  size_t waiting = 0, done = 0;
  for (auto& fibre : b.fibres) {
    waiting += fibre->state == Fibre::kAtBlock;
    done += fibre->state == Fibre::kDone;
  }
  if (waiting == b.fibres.size()) {
    for (auto& fibre : b.fibres) fibre->state = Fibre::kReady;
    progress = true;
  } else if (waiting > 0 && waiting + done == b.fibres.size()) {
    fail("some threads ended before a barrier");
  }
  for (size_t first = 0; first < b.fibres.size(); first += 32) {
    void* lanes[32];
    int count = 0;
    for (int lane = 0; lane < 32; ++lane) {
      Fibre& fibre = *b.fibres[first + lane];
      count += fibre.state == Fibre::kAtWarp;
      lanes[lane] = fibre.operands;
    }
    if (count < 32) continue;
    for (int lane = 0; lane < 32; ++lane) {
      if (b.fibres[first + lane]->operation != b.fibres[first]->operation) fail("a warp diverged");
      b.fibres[first + lane]->state = Fibre::kReady;
    }
    if (b.fibres[first]->operation != nullptr) b.fibres[first]->operation(lanes);
    progress = true;
  }
  return progress;
}

// Lets the previous kernel end where threads wait for it.
inline bool end_previous_kernel(Block& b) {
  bool waiting = false;
  for (auto& fibre : b.fibres) {
    if (fibre->state != Fibre::kAtPreviousKernel) continue;
    fibre->state = Fibre::kReady;
    waiting = true;
  }
  if (waiting) {
    b.previous_kernel_ends();
    b.previous_kernel_ends = nullptr;
  }
  return waiting;
}

// Runs all threads to their ends. A warp mostly goes on for as long as it can, so that warps drift
// as far apart as barriers let them.
inline void Block::run(Index index) {
  const unsigned warps = fibres.size() / 32;
  unsigned warp = 0;
  const auto ready = [&](unsigned w) {
    std::vector<unsigned> threads;
    for (unsigned t = w * 32; t < w * 32 + 32; ++t) {
      if (fibres[t]->state == Fibre::kReady) threads.push_back(t);
    }
    return threads;
  };
  for (;;) {
    std::vector<unsigned> threads = ready(warp);
    if (threads.empty() || random() % 64 == 0) {
      const unsigned first = random() % warps;
      for (unsigned i = 0; i < warps; ++i) {
        warp = (first + i) % warps;
        threads = ready(warp);
        if (!threads.empty()) break;
      }
    }
    std::shuffle(threads.begin(), threads.end(), random);
    for (unsigned t : threads) {
      threadIdx = {t, 0, 0};
      blockIdx = index;
      current = fibres[t].get();
      swapcontext(&scheduler, &current->context);
      current = nullptr;
      if (!error.empty()) throw std::runtime_error(error);
    }
    if (!release(*this) && threads.empty() && !end_previous_kernel(*this)) return;
  }
}

// Runs `body` once for each thread of each block. `begin` runs before each block and
// `previous_kernel_ends` when none of its threads can go on before. Throws what `fail` is told.
inline void launch(Grid grid, unsigned threads, unsigned seed, const std::function<void()>& begin,
                   const std::function<void()>& previous_kernel_ends,
                   const std::function<void()>& body) {
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        Block b;
        block = &b;
        const std::unique_ptr<Block, void (*)(Block*)> in_place(&b,
                                                                [](Block*) { block = nullptr; });
        b.random.seed(seed++);
        b.body = body;
        b.previous_kernel_ends = previous_kernel_ends;
        begin();
        for (unsigned t = 0; t < threads; ++t) {
          b.fibres.push_back(std::make_unique<Fibre>());
          Fibre& fibre = *b.fibres.back();
          getcontext(&fibre.context);
          fibre.context.uc_stack.ss_sp = fibre.stack.data();
          fibre.context.uc_stack.ss_size = fibre.stack.size();
          fibre.context.uc_link = nullptr;
          makecontext(&fibre.context, entry, 0);
        }
        b.run({x, y, z});
        for (auto& fibre : b.fibres) {
          if (fibre->state != Fibre::kDone) fail("deadlock");
        }
      }
    }
  }
}

}  // namespace permllm::cuda::emulator

namespace permllm::cuda {

using Where = std::source_location;

inline void sync_block(const Where& where = Where::current()) {
  if (emulator::leaves_out("sync_block", where)) return;
  emulator::leave(emulator::Fibre::kAtBlock);
}

inline void sync_warp(const Where& where = Where::current()) {
  if (emulator::leaves_out("sync_warp", where)) return;
  emulator::at_warp(nullptr, nullptr);
}

inline void wait_for_previous_kernel(const Where& where = Where::current()) {
  if (emulator::leaves_out("wait_for_previous_kernel", where)) return;
  if (emulator::block->previous_kernel_ends) {
    emulator::leave(emulator::Fibre::kAtPreviousKernel);
  }
  emulator::block->current->has_waited = true;
}

inline void allow_next_kernel() {
  if (!emulator::block->current->has_waited) {
    emulator::fail("the next kernel was allowed before the previous one was waited for");
  }
}

inline void copy_async_16(void* shared, const void* global, bool valid = true) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
    emulator::fail("unaligned copy");
  }
  std::memset(shared, 0xff, 16);
  emulator::block->current->open.push_back(
      {static_cast<unsigned char*>(shared),
       valid ? static_cast<const unsigned char*>(global) : nullptr});
}

inline void commit_copies() {
  emulator::Fibre& fibre = *emulator::block->current;
  fibre.committed.push_back(std::move(fibre.open));
  fibre.open.clear();
}

template <int kPending>
inline void wait_copies(const Where& where = Where::current()) {
  if (emulator::leaves_out("wait_copies", where)) return;
  auto& committed = emulator::block->current->committed;
  for (; committed.size() > kPending; committed.pop_front()) {
    for (const emulator::Copy& copy : committed.front()) {
      if (copy.source == nullptr) {
        std::memset(copy.target, 0, 16);
      } else {
        std::memcpy(copy.target, copy.source, 16);
      }
    }
  }
}

struct MatrixOperands {
  uint32_t* result;
  const void* row;
};

// Lane 4 r + c gets elements 2 c and 2 c + 1 of row r of each matrix.
inline void load_matrices(uint32_t (&result)[4], const void* row) {
  MatrixOperands own{result, row};
  emulator::at_warp(
      [](void* const* lanes) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          unsigned banks = 0;
          for (int r = 0; r < 8; ++r) {
            const void* start = static_cast<const MatrixOperands*>(lanes[matrix * 8 + r])->row;
            banks |= 1u << (reinterpret_cast<uintptr_t>(start) / 16 % 8);
          }
          if (banks != 0xff) emulator::fail("rows of a matrix share banks");
          for (int lane = 0; lane < 32; ++lane) {
            const auto* source =
                static_cast<const MatrixOperands*>(lanes[matrix * 8 + lane / 4])->row;
            if (reinterpret_cast<uintptr_t>(source) % 16) emulator::fail("unaligned ldmatrix");
            std::memcpy(&static_cast<MatrixOperands*>(lanes[lane])->result[matrix],
                        static_cast<const unsigned char*>(source) + lane % 4 * 4, 4);
          }
        }
      },
      &own);
}

struct MultiplyOperands {
  float* sum;
  const uint32_t* a;
  const uint32_t* b;
  uint32_t metadata;
};

// mma.sp.m16n8k32 for 16-bit types, by the fragment layouts of the PTX manual. With lane 4 g + t:
// a[h + 2 c] holds the stored values 2 t and 2 t + 1, plus 8 c, of row g + 8 h: group t + 4 c;
// b[i] inputs 2 t and 2 t + 1, plus 8 i, of token g; sum[i] row g + 8 (i / 2), token 2 t + i % 2.
// Lanes t = 2 selector, 2 selector + 1 hold the metadata of inputs 0..15, 16..31: row g in the low
// half of the word, row g + 8 in the high half.
template <int kSelector, float (*kToFloat)(uint16_t)>
inline void multiply_emulated(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                              uint32_t metadata) {
  MultiplyOperands own{sum, a, b, metadata};
  emulator::at_warp(
      [](void* const* lanes) {
        const auto lane_of = [&](int lane) {
          return static_cast<const MultiplyOperands*>(lanes[lane]);
        };
        const auto half_of = [](uint32_t word, int half) {
          return static_cast<double>(kToFloat(static_cast<uint16_t>(word >> (16 * half))));
        };
        double weights[16][32] = {}, inputs[32][8];
        for (int g = 0; g < 8; ++g) {
          for (int t = 0; t < 4; ++t) {
            const MultiplyOperands* lane = lane_of(4 * g + t);
            for (int i = 0; i < 8; ++i) {
              inputs[2 * t + i % 2 + 8 * (i / 2)][g] = half_of(lane->b[i / 2], i % 2);
            }
            for (int h = 0; h < 2; ++h) {
              for (int c = 0; c < 2; ++c) {
                const int group = t + 4 * c;
                const uint32_t word = lane_of(4 * g + 2 * kSelector + group / 4)->metadata;
                const uint32_t nibble = word >> (16 * h + 4 * (group % 4)) & 15;
                if ((nibble & 3) >= nibble >> 2) emulator::fail("metadata is not ordered");
                const uint32_t pair = lane->a[h + 2 * c];
                weights[g + 8 * h][4 * group + (nibble & 3)] = half_of(pair, 0);
                weights[g + 8 * h][4 * group + (nibble >> 2)] = half_of(pair, 1);
              }
            }
          }
        }
        for (int g = 0; g < 8; ++g) {
          for (int t = 0; t < 4; ++t) {
            for (int i = 0; i < 4; ++i) {
              double dot = 0;
              for (int k = 0; k < 32; ++k) {
                dot += weights[g + 8 * (i / 2)][k] * inputs[k][2 * t + i % 2];
              }
              static_cast<MultiplyOperands*>(lanes[4 * g + t])->sum[i] += static_cast<float>(dot);
            }
          }
        }
      },
      &own);
}

inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline float float16_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

template <int kSelector>
inline void multiply_bfloat16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                              uint32_t metadata) {
  multiply_emulated<kSelector, bfloat16_to_float>(sum, a, b, metadata);
}
template <int kSelector>
inline void multiply_float16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                             uint32_t metadata) {
  multiply_emulated<kSelector, float16_to_float>(sum, a, b, metadata);
}

inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return result;
}

inline uint32_t multiply_add_bfloat16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int half = 0; half < 2; ++half) {
    const auto at = [&](uint32_t word) {
      return bfloat16_to_float(static_cast<uint16_t>(word >> (16 * half)));
    };
    const float value = at(a) * at(b) + at(c);
    result |= uint32_t{__bfloat16_as_ushort(__float2bfloat16_rn(value))} << (16 * half);
  }
  return result;
}

inline uint32_t add_float16x2(uint32_t a, uint32_t b) {
  uint32_t result = 0;
  for (int half = 0; half < 2; ++half) {
    const auto at = [&](uint32_t word) {
      return float16_to_float(static_cast<uint16_t>(word >> (16 * half)));
    };
    result |= uint32_t{__half_as_ushort(__float2half_rn(at(a) + at(b)))} << (16 * half);
  }
  return result;
}

}  // namespace permllm::cuda
