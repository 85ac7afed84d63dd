#include "cpu/isa.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <initializer_list>
#include <string_view>
#include <utility>

#include "cpu/packing/layout.h"

#if defined(PERMLLM_AVX2)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace permllm::cpu {
namespace {

#if defined(PERMLLM_AVX2)  // and with it every instruction set of x86-64

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool bits(uint32_t word, std::initializer_list<int> positions) {
  return std::all_of(positions.begin(), positions.end(),
                     [word](int position) { return (word >> position & 1) != 0; });
}

// Register state that the operating system saves (XCR0), or 0 without XSAVE.
uint64_t saved_state() {
  if (!bits(cpuid(1, 0).ecx, {27})) return 0;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

bool saves(uint64_t state) { return (saved_state() & state) == state; }

#if defined(PERMLLM_EMULATED)  // instructions in software: the build of a test alone
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

bool has_avx2() {
  constexpr uint64_t kAvxState = 0x6;                                // SSE, AVX
  return saves(kAvxState) && bits(cpuid(1, 0).ecx, {12, 23, 29}) &&  // FMA, POPCNT, F16C
         bits(cpuid(7, 0).ebx, {3, 5, 8});                           // BMI1, AVX2, BMI2
}

bool has_avx512() {
  constexpr uint64_t kAvx512State = 0xe6;  // SSE, AVX, mask registers, both halves of zmm
  if (kEmulated) return has_avx2();
  return has_avx2() && saves(kAvx512State) &&
         bits(cpuid(7, 0).ebx, {16, 17, 30, 31});  // AVX512F, AVX512DQ, AVX512BW, AVX512VL
}

bool has_avx2_vnni() {
  return has_avx2() && (kEmulated || bits(cpuid(7, 1).eax, {4}));  // AVX_VNNI
}

bool has_avx512_vnni() {
  return has_avx512() && (kEmulated || bits(cpuid(7, 0).ecx, {11}));  // AVX512_VNNI
}

bool has_avx512_vbmi2() {
  return has_avx512_vnni() && (kEmulated || bits(cpuid(7, 0).ecx, {1, 6}));  // AVX512_VBMI, _VBMI2
}

bool has_avx512_bf16() {
  if (kEmulated) return has_avx512_vbmi2();
  return has_avx512_vbmi2() && bits(cpuid(7, 0).ecx, {12}) &&  // AVX512_BITALG
         bits(cpuid(7, 1).eax, {5});                           // AVX512_BF16
}

// AMD's family 26 and those after it.
bool is_zen5() {
  constexpr uint32_t kAuthenticAmd = 0x68747541;  // "Auth"
  const uint32_t eax = cpuid(1, 0).eax;
  return cpuid(0, 0).ebx == kAuthenticAmd && (eax >> 8 & 0xf) + (eax >> 20 & 0xff) >= 26;
}

#else

bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx2_vnni() { return false; }
bool has_avx512_vnni() { return false; }
bool has_avx512_vbmi2() { return false; }
bool has_avx512_bf16() { return false; }
bool is_zen5() { return false; }

#endif

#if defined(PERMLLM_EMULATE_AMX)  // tiles in software: the build of a test alone

bool has_amx() { return true; }

#elif defined(PERMLLM_AVX2)

bool has_amx() {
  constexpr uint64_t kTileState = uint64_t{3} << 17;
  if (!has_avx512_bf16() || !saves(kTileState)) return false;
  if (!bits(cpuid(7, 0).edx, {22, 24, 25})) return false;  // AMX-BF16, AMX-TILE, AMX-INT8
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#else

bool has_amx() { return false; }

#endif

// The answer of the first call: cpuid takes long in a virtual machine.
template <bool (*Has)()>
bool once() {
  static const bool found = Has();
  return found;
}

std::array<Isa, 9> fastest_first() {
  std::array<Isa, 9> every = {Isa::kAmx,         Isa::kZen5,       Isa::kAvx512Bf16,
                              Isa::kAvx512Vbmi2, Isa::kAvx512Vnni, Isa::kAvx512,
                              Isa::kAvx2Vnni,    Isa::kAvx2,       Isa::kPortable};
  if (!once<is_zen5>()) std::swap(every[1], every[2]);
  return every;
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return "amx";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kZen5:
      return "zen5";
    case Isa::kAvx512Vbmi2:
      return "avx512_vbmi2";
    case Isa::kAvx512Vnni:
      return "avx512_vnni";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2Vnni:
      return "avx2_vnni";
    case Isa::kAvx2:
      return "avx2";
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
    case Isa::kZen5:
    case Isa::kAvx512Vbmi2:
      return kAvx512Rows;
    case Isa::kAvx512Vnni:
    case Isa::kAvx512:
    case Isa::kAvx2Vnni:
    case Isa::kAvx2:
    case Isa::kPortable:
      return kPortableRows;
  }
  return 0;
}

bool undoes_permutation(Isa isa) {
  return isa == Isa::kAmx || isa == Isa::kAvx512Bf16 || isa == Isa::kZen5 ||
         isa == Isa::kAvx512Vbmi2;
}

bool supported(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return once<has_amx>();
    case Isa::kAvx512Bf16:
    case Isa::kZen5:
      return once<has_avx512_bf16>();
    case Isa::kAvx512Vbmi2:
      return once<has_avx512_vbmi2>();
    case Isa::kAvx512Vnni:
      return once<has_avx512_vnni>();
    case Isa::kAvx512:
      return once<has_avx512>();
    case Isa::kAvx2Vnni:
      return once<has_avx2_vnni>();
    case Isa::kAvx2:
      return once<has_avx2>();
    case Isa::kPortable:
      return true;
  }
  return false;
}

std::string supported_names() {
  std::string names;
  for (Isa isa : fastest_first()) {
    if (!supported(isa)) continue;
    if (!names.empty()) names += ",";
    names += name(isa);
  }
  return names;
}

Isa select(const std::string& requested) {
  const char* override = std::getenv("PERMLLM_CPU_ISA");
  const bool overridden = requested.empty() && override != nullptr && *override != '\0';
  const std::string_view wanted = overridden ? std::string_view(override) : requested;
  const auto order = fastest_first();
  const auto found = std::find_if(order.begin(), order.end(), [&](Isa isa) {
    return wanted.empty() ? supported(isa) : wanted == name(isa);
  });
  const bool known = found != order.end();
  if (known && supported(*found)) return *found;

  const char* source = overridden ? "PERMLLM_CPU_ISA=" : "";
  const char* remedy = overridden ? " Unset it to take the fastest of them."
                                  : " Name none to take the fastest of them.";
  STD_TORCH_CHECK(!known, source, wanted, " cannot run: this CPU or build has only ",
                  supported_names(), ".", remedy);
  std::string every;
  for (Isa isa : order) every += (every.empty() ? "" : ", ") + std::string(name(isa));
  STD_TORCH_CHECK(false, source, wanted, " names no instruction set: it must be one of ", every,
                  "; this CPU and build run ", supported_names(), ".", remedy);
  return Isa::kPortable;
}

}  // namespace permllm::cpu
