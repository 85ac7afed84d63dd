// What GPUs deliver in a clock, and what a kernel more costs: the figures that choices are made by.
// Data sheets and guesses, none of them measured here.
#pragma once

namespace permllm::cuda {

// Of shared memory, each processor.
constexpr int kSharedBytesPerClock = 128;

// Of the second-level cache, for each processor when all read: 5.5 TB/s at 1.75 GHz of an H100.
// Taken to be the same on sm_100.
constexpr int kCacheBytesPerClock = 24;

// What another kernel in front takes at least, in whatever it overlaps: 1 us of an H100, a guess.
constexpr int kPassClocks = 1750;

// Of memory, for each processor: 3.35 TB/s at 1.75 GHz of an H100, which an A100 comes near to.
// Twice that on sm_100. Others, whose memory is no HBM, have 2.5 (L4) to 4.4 (RTX 5090).
constexpr int memory_bytes_per_clock(int capability) {
  if (capability == 80 || capability == 90) return 14;
  return capability == 100 || capability == 103 ? 28 : 4;
}

}  // namespace permllm::cuda
