#include "dense.h"

#include "isa.h"
#include "region.h"

namespace permllm::cpu {
namespace {

// Nothing where the instruction set has no kernel.
KernelOf<bf16> dense_kernel() {
  switch (select("")) {
#if defined(PERMLLM_AMX)
    case Isa::kAmx:
      return {amx_dense, AmxTuning::kDenseTokens, sizeof(bf16)};
#endif
#if defined(PERMLLM_AVX512)
    case Isa::kAvx512Bf16:
      return {avx512_dense<Avx512Bf16Tuning>, Avx512Bf16Tuning::kDenseTokens, sizeof(bf16)};
    case Isa::kZen5:
      return {avx512_dense<Zen5Tuning>, Zen5Tuning::kDenseTokens, sizeof(bf16)};
#endif
    default:
      return {};
  }
}

}  // namespace

int64_t dense_tokens() { return dense_kernel().packed_tokens; }

void dense_linear(const LinearArguments& arguments) {
  run_in_region(dense_kernel(), arguments, nullptr);
}

}  // namespace permllm::cpu
