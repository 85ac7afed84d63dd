// C interface for the tests of this folder to the AMX kernels, run on the emulated tile unit and on
// threads of its own instead of torch's.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/amx/tile.h"
#include "cpu/threads/region.h"
#include "cpu/threads/threads.h"
#include "cpu/tuning.h"

namespace permllm::cpu {
namespace {

int64_t threads = 1;
bool in_turn = false;  // a pool that runs one range after another on the calling thread
std::atomic<int64_t> regions{0};
void (*after_range)(int64_t) = nullptr;  // told which one has run in turn

constexpr size_t kPage = 4096;
char* slow_page = nullptr;
struct sigaction usual_action;

// Holds up the thread that touched the slow page, then lets it read. Any other fault repeats, for
// the action that was there before.
void on_fault(int, siginfo_t* info, void*) {
  const auto* address = static_cast<const char*>(info->si_addr);
  if (address >= slow_page && address < slow_page + kPage) {
    usleep(50'000);
    mprotect(slow_page, kPage, PROT_READ);
  } else {
    sigaction(SIGSEGV, &usual_action, nullptr);
  }
}

}  // namespace

int64_t thread_count() { return threads; }

void parallel_ranges(int64_t count, void (*body)(void* context, int64_t begin, int64_t end),
                     void* context) {
  if (count > 1 && threads > 1) ++regions;
  const int64_t step = ceil_div(count, threads);
  std::vector<std::thread> running;
  for (int64_t begin = 0; begin < count; begin += step) {
    const int64_t end = std::min(begin + step, count);
    if (in_turn || threads == 1) {
      body(context, begin, end);
      if (after_range != nullptr) after_range(begin / step);
    } else {
      running.emplace_back(body, context, begin, end);
    }
  }
  for (std::thread& thread : running) thread.join();
}

}  // namespace permllm::cpu

using permllm::cpu::bf16;
using permllm::cpu::LinearArguments;
using permllm::cpu::TileConfig;
using permllm::cpu::TileSession;

extern "C" {

void set_threads(int64_t count, bool in_turn) {
  permllm::cpu::threads = count;
  permllm::cpu::in_turn = in_turn;
}

// Calls of parallel_ranges that could not run on the caller alone, as torch counts.
int64_t count_regions() { return permllm::cpu::regions; }

void set_after_range(void (*told)(int64_t)) { permllm::cpu::after_range = told; }

// `kernel` is one of 0 few, 1 several, 2 many.
void run(int64_t kernel, const bf16* x, int64_t x_stride, int64_t m, const void* packed, int64_t n,
         int64_t k, const bf16* bias, const float* scale, bf16* y) {
  using namespace permllm::cpu;
  const LinearArguments arguments{x, x_stride, m, packed, n, k, bias, y, scale};
  constexpr decltype(&amx_few_tokens<bf16>) kBf16[] = {amx_few_tokens<bf16>, nullptr,
                                                       amx_many_tokens<bf16>};
  constexpr decltype(&amx_few_tokens<bf16>) kInt8[] = {
      amx_int8_few_tokens<int8_t>, amx_int8_several_tokens<int8_t>, amx_int8_many_tokens<int8_t>};
  const auto chosen = (scale == nullptr ? kBf16 : kInt8)[kernel];
  run_in_region<bf16>({chosen, AmxTuning::kPackedTokens, sizeof(bf16)}, arguments, nullptr);
}

void run_dense(const bf16* x, int64_t x_stride, int64_t m, const bf16* rows, int64_t n, int64_t k,
               bf16* y) {
  using namespace permllm::cpu;
  const LinearArguments arguments{x, x_stride, m, rows, n, k, nullptr, y};
  const KernelOf<bf16> kernel{amx_dense, AmxTuning::kDenseTokens, sizeof(bf16)};
  run_in_region(kernel, arguments, nullptr);
}

// Makes the next thread that reads `page` late, as if it had lost its CPU. End with null.
void set_slow_page(char* page) {
  using namespace permllm::cpu;
  if (page == nullptr) {
    sigaction(SIGSEGV, &usual_action, nullptr);
    return;
  }
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, &usual_action);
  slow_page = page;
  mprotect(page, kPage, PROT_NONE);
}

// The first rule that was broken since the last call, or null.
const char* take_violation() { return tile_emulation::first_violation.exchange(nullptr); }

int configured_units() { return tile_emulation::configured_units; }
int64_t take_multiply_adds() { return tile_emulation::multiply_adds.exchange(0); }

// C += A B on whole tiles: float32 [16, 16], bfloat16 [16, 32], bfloat16 [16, 16, 2].
void multiply_add(float* c, const bf16* a, const bf16* b) {
  namespace cpu = permllm::cpu;
  const TileSession session(16, 16);
  cpu::tile::load<cpu::kSum00>(c, 64);
  cpu::tile::load<cpu::kWeights0>(a, 64);
  cpu::tile::load<cpu::kTokens0>(b, 64);
  cpu::tile::multiply_add<cpu::kSum00, cpu::kWeights0, cpu::kTokens0>();
  cpu::tile::store<cpu::kSum00>(c, 64);
}

// The same for int8 [16, 64] and bytes [16, 16, 4], into int32.
void multiply_add_bytes(bool is_signed, int32_t* c, const void* a, const void* b) {
  namespace cpu = permllm::cpu;
  const TileSession session(16, 16);
  cpu::tile::load<cpu::kSum00>(c, 64);
  cpu::tile::load<cpu::kWeights0>(a, 64);
  cpu::tile::load<cpu::kTokens0>(b, 64);
  if (is_signed) {
    cpu::tile::multiply_add_int8<cpu::kSum00, cpu::kWeights0, cpu::kTokens0>();
  } else {
    cpu::tile::multiply_add_uint8<cpu::kSum00, cpu::kWeights0, cpu::kTokens0>();
  }
  cpu::tile::store<cpu::kSum00>(c, 64);
}

// Breaks one rule of the tile unit; false when there is no such case.
bool misuse(const char* rule) {
  namespace cpu = permllm::cpu;
  alignas(64) static char memory[1024];
  const auto is = [rule](const char* name) { return std::strcmp(rule, name) == 0; };
  if (is("use before configure")) {
    cpu::tile::zero<0>();
  } else if (is("use after release")) {
    {
      const TileSession session(16, 16);
    }
    cpu::tile::load<cpu::kWeights0>(memory, 64);
  } else if (is("release twice")) {
    const TileSession session(16, 16);
    cpu::tile::release();
  } else if (is("configure twice")) {
    const TileSession outer(16, 16);
    TileConfig config;
    cpu::tile::configure(&config);
  } else if (is("unconfigured tile")) {
    TileConfig config;
    config.set(0, 16, 64);
    cpu::tile::configure(&config);
    cpu::tile::zero<1>();
    cpu::tile::release();
  } else if (is("oversized tile")) {
    TileConfig config;
    config.set(0, 17, 64);
    cpu::tile::configure(&config);
    cpu::tile::release();
  } else if (is("stride of another configuration")) {
    const TileSession session(16, 16);
    cpu::tile::load<cpu::kTokens0>(memory, 16);
  } else if (is("columns of another tile")) {
    const TileSession session(16, 4);
    cpu::tile::multiply_add<cpu::kSum00, cpu::kWeights0, cpu::kTokens1>();
  } else if (is("rows of another tile")) {
    TileConfig config;
    config.set(0, 8, 64);
    config.set(1, 16, 64);
    config.set(2, 16, 64);
    cpu::tile::configure(&config);
    cpu::tile::multiply_add<0, 1, 2>();
    cpu::tile::release();
  } else if (is("same tile twice")) {
    const TileSession session(16, 16);
    cpu::tile::multiply_add<cpu::kSum00, cpu::kWeights0, cpu::kWeights0>();
  } else {
    return false;
  }
  return true;
}

}  // extern "C"
