#include "dense.h"

#include "isa.h"
#include "region.h"

namespace permllm::cpu {
namespace {

#if defined(PERMLLM_AVX512)
template <class Tuning>
KernelOf<bf16> avx512(int64_t k) {
  const int64_t bytes = Tuning::kDenseTokens * k * static_cast<int64_t>(sizeof(bf16));
  const bool inside_l1 = bytes <= Tuning::kDenseL1Bytes;
  return {avx512_dense<Tuning>, inside_l1 ? Tuning::kDenseTokens : Tuning::kDenseTokensPastL1,
          sizeof(bf16)};
}
#endif

// Nothing where the instruction set has no kernel.
KernelOf<bf16> dense_kernel([[maybe_unused]] int64_t k) {
  switch (select("")) {
#if defined(PERMLLM_AMX)
    case Isa::kAmx:
      return {amx_dense, AmxTuning::kDenseTokens, sizeof(bf16)};
#endif
#if defined(PERMLLM_AVX512)
    case Isa::kAvx512Bf16:
      return avx512<Avx512Bf16Tuning>(k);
    case Isa::kZen5:
      return avx512<Zen5Tuning>(k);
#endif
    default:
      return {};
  }
}

}  // namespace

int64_t dense_tokens(int64_t k) { return dense_kernel(k).packed_tokens; }

void dense_linear(const LinearArguments& arguments) {
  run_in_region(dense_kernel(arguments.k), arguments, nullptr);
}

}  // namespace permllm::cpu
