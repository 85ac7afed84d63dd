// bfloat16 values in 12 bits, inputs brought to them: vpermw and vdpbf16ps.
#include "cpu/avx512/bfloat16.h"
#include "cpu/avx512/kept_few.h"
#include "cpu/avx512/kept_many.h"

namespace permllm::cpu {
namespace {

template <class Tuning>
struct KeptProducts : Bfloat16Products<Tuning, bf12> {
  static constexpr int kPlanes = 1;
  static constexpr int kOneTokenFetch = Tuning::kKeptOneTokenFetch;

  static __m512i multiply_kept(__m512i sum, __m512i places, __m512i values, __m512i x) {
    return Bfloat16Products<Tuning, bf12>::multiply_one(sum, values,
                                                        _mm512_permutexvar_epi16(places, x));
  }
};

}  // namespace

template <class Tuning>
void avx512_kept_few_tokens(const LinearArguments& a, Worker& worker) {
  go_through(KeptFewTokens<KeptProducts<Tuning>>(a), a.last, worker);
}

template <class Tuning>
void avx512_kept_many_tokens(const LinearArguments& a, Worker& worker) {
  multiply_kept_many_tokens<KeptProducts<Tuning>>(a, worker);
}

template void avx512_kept_few_tokens<Avx512Bf16Tuning>(const LinearArguments&, Worker&);
template void avx512_kept_few_tokens<Zen5Tuning>(const LinearArguments&, Worker&);
template void avx512_kept_many_tokens<Avx512Bf16Tuning>(const LinearArguments&, Worker&);
template void avx512_kept_many_tokens<Zen5Tuning>(const LinearArguments&, Worker&);

}  // namespace permllm::cpu
