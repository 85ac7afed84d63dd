// Which instruction set serves: found at run time, overridden by PERMLLM_CPU_ISA.
#pragma once

#include <cstdint>
#include <string>

namespace permllm::cpu {

// The numbers are part of the packed layout's metadata.
enum class Isa : int64_t {
  kPortable = 0,
  kAvx512Bf16 = 1,
  kAmx = 2,
  kAvx2 = 3,
  kAvx512 = 4,
  kZen5 = 5,  // those of kAvx512Bf16, with constants of their own
  // Those of kAvx512 and kAvx2, but for int8 values.
  kAvx512Vnni = 6,
  kAvx2Vnni = 7,
  kAvx512Vbmi2 = 8,  // the expanding ones for int8 values, and none for others
};

const char* name(Isa isa);

// Rows of one packed block that is not in groups.
int rows(Isa isa);

// True where packing takes the permutation of blocks of 32 and 64, and kernels need none: they take
// any 32 of 64 inputs, so that it is undone, or shuffle x by an order that is packed (layout.h).
// The others find their values without counting, in the permuted order.
bool undoes_permutation(Isa isa);

// True where blocks of int8 values and of 12 bits may be in groups (layout.h).
constexpr bool has_groups(Isa isa) { return isa == Isa::kAvx512Bf16 || isa == Isa::kZen5; }

// True where blocks are in lanes (layout.h).
constexpr bool has_lanes(Isa isa) { return isa == Isa::kAvx2 || isa == Isa::kAvx2Vnni; }

// True when this build has the kernels, and this CPU and operating system run them. For AMX this
// asks Linux for the tile registers, once per process.
bool supported(Isa isa);

// The supported instruction sets, fastest first, separated by commas.
std::string supported_names();

// The instruction set with this name; for an empty name the one in PERMLLM_CPU_ISA, or else the
// fastest supported one. Throws for an unknown name, and for one that this CPU or build cannot run.
Isa select(const std::string& requested);

}  // namespace permllm::cpu
