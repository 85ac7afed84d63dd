// bfloat16 values for many tokens: vdpbf16ps on pairs of inputs.
#include "avx512_many.h"

namespace permllm::cpu {
namespace {

template <class CoreTuning>
struct Bfloat16Products {
  using Tuning = CoreTuning;
  using Value = bf16;
  using Element = bf16;

  static void expand(const Block<kRows>& block, int row, bf16* target) {
    __m512i weights[2];
    expand_row<Tuning>(block, row, weights);
    _mm512_store_si512(target, weights[0]);
    _mm512_store_si512(target + 32, weights[1]);
  }

  static __m512i multiply(__m512i sum, __m512i tokens, __m512i weights) {
    return _mm512_castps_si512(dot_pairs(_mm512_castsi512_ps(sum), weights, tokens));
  }

  struct Inputs {
    explicit Inputs(const LinearArguments& arguments) : a(arguments) {}

    static int64_t measures() { return 0; }
    static void measure(int64_t) {}

    __m512i load(int64_t token, int64_t first) const {
      return load_row(a, token, first, first_lanes(a.k - first));
    }

    const LinearArguments& a;
  };

  struct Outputs {
    Outputs(const LinearArguments&, const Inputs&) {}

    static __m512 convert(__m512i sums, int64_t, int64_t) { return _mm512_castsi512_ps(sums); }
  };
};

}  // namespace

template <class Tuning>
void avx512_many_tokens(const LinearArguments& a, Worker& worker) {
  go_through_parts<ManyTokens<Bfloat16Products<Tuning>>>(a, worker);
}

template void avx512_many_tokens<Avx512Bf16Tuning>(const LinearArguments&, Worker&);
template void avx512_many_tokens<Zen5Tuning>(const LinearArguments&, Worker&);

}  // namespace permllm::cpu
