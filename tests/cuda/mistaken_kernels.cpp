// Small kernels with one mistake each: what the emulator is there to find.
#include <map>

#include "device.h"
#include "guarded.h"

namespace permllm::cuda {
namespace {

constexpr unsigned kThreads = 64;

struct Operands {
  const float* x;
  float* y;  // x + 1
  float* shared;
};

float plus_one(const Operands& o) { return o.x[threadIdx.x] + 1; }

// Adds one through shared memory: thread i takes what thread 63 - i brought.
void by_copies(const Operands& o, bool waits, bool meets) {
  if (threadIdx.x < kThreads / 4) copy_async_16(o.shared + 4 * threadIdx.x, o.x + 4 * threadIdx.x);
  commit_copies();
  if (waits) wait_copies<0>();
  if (meets) sync_block();
  const unsigned other = kThreads - 1 - threadIdx.x;
  o.y[other] = o.shared[other] + 1;
}

const std::map<std::string, void (*)(const Operands&)> kKernels = {
    {"none", [](const Operands& o) { o.y[threadIdx.x] = plus_one(o); }},
    {"none, by copies", [](const Operands& o) { by_copies(o, true, true); }},
    {"does not wait for copies", [](const Operands& o) { by_copies(o, false, true); }},
    {"no barrier after copies", [](const Operands& o) { by_copies(o, true, false); }},
    {"one thread misses a barrier",
     [](const Operands& o) {
       if (threadIdx.x != 40) sync_block();
       o.y[threadIdx.x] = plus_one(o);
     }},
    {"writes past its memory",
     [](const Operands& o) { o.y[threadIdx.x == 40 ? kThreads : threadIdx.x] = plus_one(o); }},
    {"copies are not committed",
     [](const Operands& o) {
       copy_async_16(o.shared + 4 * threadIdx.x, o.x);
       o.y[threadIdx.x] = plus_one(o);
     }},
};

}  // namespace
}  // namespace permllm::cuda

using namespace permllm::cuda;

extern "C" {

// What the emulator says of the kernel with this mistake, null if it found none.
const char* run_mistaken(const char* mistake) {
  float numbers[kThreads];
  for (unsigned i = 0; i < kThreads; ++i) numbers[i] = static_cast<float>(i);
  Guarded x(numbers, sizeof numbers), y(sizeof numbers), shared(16 * kThreads);
  const Operands operands{reinterpret_cast<const float*>(x.data), reinterpret_cast<float*>(y.data),
                          reinterpret_cast<float*>(shared.data)};
  const auto kernel = kKernels.at(mistake);
  return error_of([&] {
    launch_with(shared, {1}, kThreads, 0, [&] { kernel(operands); });
    for (unsigned i = 0; i < kThreads; ++i) {
      if (!(operands.y[i] == numbers[i] + 1)) emulator::fail("wrong numbers");
    }
  });
}
}
