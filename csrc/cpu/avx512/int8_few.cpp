// int8 values for up to 16 tokens.
#include "cpu/avx512/few.h"
#include "cpu/avx512/int8.h"
#include "cpu/avx512/several.h"

namespace permllm::cpu {

template <class Tuning, class Value>
void avx512_int8_several_tokens(const LinearArguments& a, Worker& worker) {
  multiply_several_tokens<Int8Products<Tuning, Value, 1>>(a, worker);
}

template <class Tuning, class Value, int Most>
void avx512_int8_few_tokens(const LinearArguments& a, Worker& worker) {
  constexpr int kSplit = Tuning::kSplitTokens;
  a.m <= kSplit ? multiply_few_tokens<Int8Products<Tuning, Value, 2>, kSplit>(a, worker)
                : multiply_few_tokens<Int8Products<Tuning, Value, 1>, Most, kSplit + 1>(a, worker);
}

#define PERMLLM_INSTANTIATE(Tuning, Value, Most)                                            \
  template void avx512_int8_several_tokens<Tuning, Value>(const LinearArguments&, Worker&); \
  template void avx512_int8_few_tokens<Tuning, Value, Most>(const LinearArguments&, Worker&);
PERMLLM_INSTANTIATE(Avx512Bf16Tuning, int8_t, Avx512Bf16Tuning::kFewTokensInt8)
PERMLLM_INSTANTIATE(Avx512Bf16Tuning, int4, Avx512Bf16Tuning::kFewTokensInt8)
PERMLLM_INSTANTIATE(Avx512Bf16Tuning, dense8, Avx512Bf16Tuning::kFewTokensDense8)
PERMLLM_INSTANTIATE(Zen5Tuning, int8_t, Zen5Tuning::kFewTokensInt8)
PERMLLM_INSTANTIATE(Zen5Tuning, int4, Zen5Tuning::kFewTokensInt8)
PERMLLM_INSTANTIATE(Zen5Tuning, dense8, Zen5Tuning::kFewTokensDense8)
#undef PERMLLM_INSTANTIATE

}  // namespace permllm::cpu
