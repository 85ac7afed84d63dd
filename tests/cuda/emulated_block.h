// A GPU block on the CPU: runs the kernels' own code, one fibre per thread.
//
// It is hard on the code where hardware may be: warps drift apart between barriers and threads run
// in a random order, an asynchronous copy poisons its target at once and arrives only when its
// thread waits for it, and all shared memory starts poisoned. Code that synchronises too little
// gives NaN, wrong numbers or an error.
//
// Every barrier and wait knows its line, so that a test can leave one out (`left_out`).
#pragma once

#include <signal.h>
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
  static constexpr size_t kStackBytes = 128 << 10;

  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  enum { kReady, kAtBlock, kAtWarp, kDone } state = kReady;
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

// While there is one, a thread that touches memory that is not mapped ends the launch.
class FaultsFail {
 public:
  FaultsFail() {
    struct sigaction action = {};
    action.sa_handler = [](int) {
      if (block == nullptr || block->current == nullptr) {
        signal(SIGSEGV, SIG_DFL);  // no thread of a kernel: once more, and for good
        return;
      }
      fail("a thread touched memory that is not there");
    };
    action.sa_flags = SA_NODEFER;  // the handler is never returned from
    sigaction(SIGSEGV, &action, &before_);
  }
  ~FaultsFail() { sigaction(SIGSEGV, &before_, nullptr); }
  FaultsFail(const FaultsFail&) = delete;
  FaultsFail& operator=(const FaultsFail&) = delete;

 private:
  struct sigaction before_;
};

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
    if (!release(*this) && threads.empty()) return;
  }
}

// Runs `body` once for each thread of each block, before which `begin` runs. Throws what `fail` is
// told.
inline void launch(Grid grid, unsigned threads, unsigned seed, const std::function<void()>& begin,
                   const std::function<void()>& body) {
  const FaultsFail faults_fail;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        Block b;
        block = &b;
        const std::unique_ptr<Block, void (*)(Block*)> in_place(&b,
                                                                [](Block*) { block = nullptr; });
        b.random.seed(seed++);
        b.body = body;
        begin();
        for (unsigned t = 0; t < threads; ++t) {
          b.fibres.push_back(std::make_unique<Fibre>());
          Fibre& fibre = *b.fibres.back();
          getcontext(&fibre.context);
          fibre.context.uc_stack.ss_sp = fibre.stack.get();
          fibre.context.uc_stack.ss_size = Fibre::kStackBytes;
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
