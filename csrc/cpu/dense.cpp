#include "cpu/dense.h"

#include "cpu/isa.h"

namespace permllm::cpu {
namespace {

#if defined(PERMLLM_AVX512)
template <class Tuning>
DenseKernel avx512(int64_t k, bool half) {
  if (half) {
    return {{avx512_dense<Tuning>, Tuning::kDenseTokens, sizeof(float)}, kAnyTokens};
  }
  const int64_t bytes = Tuning::kDenseTokens * k * static_cast<int64_t>(sizeof(bf16));
  const bool inside_l1 = bytes <= Tuning::kDenseL1Bytes;
  const int64_t tokens = inside_l1 ? Tuning::kDenseTokens : Tuning::kDenseTokensPastL1;
  return {{avx512_dense<Tuning>, tokens, sizeof(bf16)}, tokens};
}
#endif

#if defined(PERMLLM_AVX2)
DenseKernel avx2(int64_t n, int64_t k) {
  if (n % kPortableRows != 0 || k % kBlockInputs != 0) return {};
  return {{avx2_dense, Avx2Tuning::kPackedTokens, sizeof(float)}, kAnyTokens};
}
#endif

}  // namespace

DenseKernel dense_kernel([[maybe_unused]] int64_t n, [[maybe_unused]] int64_t k,
                         [[maybe_unused]] bool half) {
  switch (select("")) {
#if defined(PERMLLM_AMX)
    case Isa::kAmx:
      if (half) return {};
      return {
          {amx_dense, AmxTuning::kDenseTokens, sizeof(bf16)},
          AmxTuning::kDenseTokens,
          k < AmxTuning::kDenseInPlaceInputs ? kAnyTokens : AmxTuning::kDenseCopiedTokens,
      };
#endif
#if defined(PERMLLM_AVX512)
    case Isa::kAvx512Bf16:
      return avx512<Avx512Bf16Tuning>(k, half);
    case Isa::kZen5:
      return avx512<Zen5Tuning>(k, half);
#endif
#if defined(PERMLLM_AVX2)
    case Isa::kAvx2Vnni:
    case Isa::kAvx2:
      return avx2(n, k);
#endif
    default:
      return {};
  }
}

void dense_linear(const DenseKernel& kernel, const LinearArguments& a) {
  run_in_region(kernel.kernel, a, nullptr);
}

}  // namespace permllm::cpu
