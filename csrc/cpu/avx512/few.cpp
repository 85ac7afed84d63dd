// bfloat16 values for up to 16 tokens.
#include "cpu/avx512/few.h"

#include "cpu/avx512/bfloat16.h"
#include "cpu/avx512/several.h"

namespace permllm::cpu {

template <class Tuning, class Value>
void avx512_several_tokens(const LinearArguments& a, Worker& worker) {
  multiply_several_tokens<Bfloat16Products<Tuning, Value>>(a, worker);
}

template <class Tuning, class Value, int Most>
void avx512_few_tokens(const LinearArguments& a, Worker& worker) {
  multiply_few_tokens<Bfloat16Products<Tuning, Value>, Most>(a, worker);
}

#define PERMLLM_INSTANTIATE(Tuning, Value, Most)                                       \
  template void avx512_several_tokens<Tuning, Value>(const LinearArguments&, Worker&); \
  template void avx512_few_tokens<Tuning, Value, Most>(const LinearArguments&, Worker&);
PERMLLM_INSTANTIATE(Avx512Bf16Tuning, bf16, Avx512Bf16Tuning::kFewTokens)
PERMLLM_INSTANTIATE(Avx512Bf16Tuning, dense12, Avx512Bf16Tuning::kFewTokensDense)
PERMLLM_INSTANTIATE(Zen5Tuning, bf16, Zen5Tuning::kFewTokens)
PERMLLM_INSTANTIATE(Zen5Tuning, dense12, Zen5Tuning::kFewTokensDense)
#undef PERMLLM_INSTANTIATE

}  // namespace permllm::cpu
