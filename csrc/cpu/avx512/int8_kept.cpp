// int8 values, inputs brought to them: vpermb and vpdpbusd.
#include "cpu/avx512/int8.h"
#include "cpu/avx512/kept_few.h"
#include "cpu/avx512/kept_many.h"

namespace permllm::cpu {
namespace {

template <class Tuning, class Value, int Bytes>
struct KeptProducts : Int8Products<Tuning, Value, Bytes> {
  static constexpr int kPlanes = Bytes;
  static constexpr int kOneTokenFetch =
      std::is_same_v<Value, int4> ? Tuning::kKeptOneTokenFetchInt4 : Tuning::kKeptOneTokenFetchInt8;

  static __m512i multiply_kept(__m512i sum, __m512i places, __m512i values, __m512i x) {
    return _mm512_dpbusd_epi32(sum, _mm512_permutexvar_epi8(places, x), values);
  }
};

}  // namespace

template <class Tuning, class Value>
void avx512_int8_kept_few_tokens(const LinearArguments& a, Worker& worker) {
  if (a.m <= Tuning::kSplitTokens) {
    go_through(KeptFewTokens<KeptProducts<Tuning, Value, 2>>(a), a.last, worker);
  } else {
    go_through(KeptFewTokens<KeptProducts<Tuning, Value, 1>>(a), a.last, worker);
  }
}

template <class Tuning, class Value>
void avx512_int8_kept_many_tokens(const LinearArguments& a, Worker& worker) {
  multiply_kept_many_tokens<KeptProducts<Tuning, Value, 1>>(a, worker);
}

#define PERMLLM_INSTANTIATE(Tuning, Value)                                                   \
  template void avx512_int8_kept_few_tokens<Tuning, Value>(const LinearArguments&, Worker&); \
  template void avx512_int8_kept_many_tokens<Tuning, Value>(const LinearArguments&, Worker&);
PERMLLM_INSTANTIATE(Avx512Bf16Tuning, int8_t)
PERMLLM_INSTANTIATE(Avx512Bf16Tuning, int4)
PERMLLM_INSTANTIATE(Zen5Tuning, int8_t)
PERMLLM_INSTANTIATE(Zen5Tuning, int4)
#undef PERMLLM_INSTANTIATE

}  // namespace permllm::cpu
