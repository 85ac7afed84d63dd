#include "isa.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>

#include "layout.h"

#if defined(PERMLLM_AVX512)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace permllm::cpu {
namespace {

constexpr Isa kFastestFirst[] = {Isa::kAmx, Isa::kAvx512Bf16, Isa::kPortable};

#if defined(PERMLLM_AVX512)

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool bit(uint32_t word, int position) { return (word >> position & 1) != 0; }

// Register state that the operating system saves (XCR0), or 0 without XSAVE.
uint64_t saved_state() {
  if (!bit(cpuid(1, 0).ecx, 27)) return 0;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

bool has_avx512_bf16() {
  constexpr uint64_t kAvx512State = 0xe6;  // SSE, AVX, mask registers, both halves of zmm
  const Registers r = cpuid(7, 0);
  return (saved_state() & kAvx512State) == kAvx512State && bit(r.ebx, 8) &&  // BMI2
         bit(r.ebx, 16) && bit(r.ebx, 17) &&                                 // AVX512F, AVX512DQ
         bit(r.ebx, 30) && bit(r.ebx, 31) &&                                 // AVX512BW, AVX512VL
         bit(r.ecx, 6) && bit(r.ecx, 11) &&  // AVX512_VBMI2, AVX512_VNNI
         bit(cpuid(7, 1).eax, 5);            // AVX512_BF16
}

#if defined(PERMLLM_AMX)
bool has_amx() {
  constexpr uint64_t kTileState = uint64_t{3} << 17;
  const Registers r = cpuid(7, 0);
  if (!has_avx512_bf16() || (saved_state() & kTileState) != kTileState) return false;
  if (!bit(r.edx, 22) || !bit(r.edx, 24)) return false;  // AMX-BF16, AMX-TILE
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

#endif

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return "amx";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kPortable:
      return "portable";
  }
  return "unknown";
}

int rows(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return kAmxRows;
    case Isa::kAvx512Bf16:
      return kAvx512Rows;
    case Isa::kPortable:
      return kPortableRows;
  }
  return 0;
}

bool supported(Isa isa) {
  switch (isa) {
    case Isa::kAmx: {
#if defined(PERMLLM_AMX)
      static const bool amx = has_amx();
      return amx;
#else
      return false;
#endif
    }
    case Isa::kAvx512Bf16: {
#if defined(PERMLLM_AVX512)
      static const bool avx512_bf16 = has_avx512_bf16();
      return avx512_bf16;
#else
      return false;
#endif
    }
    case Isa::kPortable:
      return true;
  }
  return false;
}

std::string supported_names() {
  std::string names;
  for (Isa isa : kFastestFirst) {
    if (!supported(isa)) continue;
    if (!names.empty()) names += ",";
    names += name(isa);
  }
  return names;
}

Isa select(const std::string& requested) {
  std::string wanted = requested;
  const char* override = std::getenv("PERMLLM_CPU_ISA");
  if (wanted.empty() && override != nullptr) wanted = override;
  for (Isa isa : kFastestFirst) {
    if (wanted.empty() ? supported(isa) : wanted == name(isa)) {
      STD_TORCH_CHECK(supported(isa), "instruction set ", wanted,
                      " was asked for, but this CPU or build runs only: ", supported_names(),
                      ". Unset PERMLLM_CPU_ISA to take the fastest of them.");
      return isa;
    }
  }
  STD_TORCH_CHECK(false, "unknown instruction set \"", wanted,
                  "\": PERMLLM_CPU_ISA is one of amx, avx512_bf16, portable.");
  return Isa::kPortable;
}

}  // namespace permllm::cpu
