#include "dense.h"

#include "isa.h"
#include "region.h"

namespace permllm::cpu {

int64_t dense_tokens() {
#if defined(PERMLLM_AVX512)
  const Isa isa = select("");
  if (isa == Isa::kAvx512Bf16 || isa == Isa::kAmx) return Avx512Bf16Tuning::kDenseTokens;
#endif
  return 0;
}

void dense_linear([[maybe_unused]] const LinearArguments& arguments) {
#if defined(PERMLLM_AVX512)
  run_in_region<bf16>({avx512_dense, Avx512Bf16Tuning::kDenseTokens, sizeof(bf16)}, arguments,
                      nullptr);
#endif
}

}  // namespace permllm::cpu
