// bfloat16 values for many tokens: vdpbf16ps on pairs of inputs.
#include "cpu/avx512/many.h"

namespace permllm::cpu {
namespace {

template <class CoreTuning, class ValueType>
struct Bfloat16Products {
  using Tuning = CoreTuning;
  using Value = ValueType;
  using Element = bf16;
  using Rows = ExpandedRows<Tuning, Value>;

  static __m512i multiply(__m512i sum, __m512i tokens, __m512i weights) {
    return _mm512_castps_si512(dot_pairs(_mm512_castsi512_ps(sum), weights, tokens));
  }

  struct Inputs {
    explicit Inputs(const LinearArguments& arguments) : a(arguments) {}

    static int64_t measures() { return 0; }
    static void measure(int64_t) {}

    __m512i load(int64_t token, int64_t first) const { return load_half(a, token, first); }

    const LinearArguments& a;
  };

  struct Outputs {
    Outputs(const LinearArguments&, const Inputs&) {}

    static __m512 convert(__m512i sums, int64_t, int64_t) { return _mm512_castsi512_ps(sums); }
  };
};

}  // namespace

template <class Tuning, class Value>
void avx512_many_tokens(const LinearArguments& a, Worker& worker) {
  go_through_parts<ManyTokens<Bfloat16Products<Tuning, Value>>>(a, worker);
}

template void avx512_many_tokens<Avx512Bf16Tuning, bf16>(const LinearArguments&, Worker&);
template void avx512_many_tokens<Avx512Bf16Tuning, dense12>(const LinearArguments&, Worker&);
template void avx512_many_tokens<Zen5Tuning, bf16>(const LinearArguments&, Worker&);
template void avx512_many_tokens<Zen5Tuning, dense12>(const LinearArguments&, Worker&);

}  // namespace permllm::cpu
