// int8 values for many tokens, W8A8: vpdpbusd on four inputs, twice the products of bfloat16.
#include "cpu/avx512/many.h"
#include "cpu/avx512/quantize.h"

namespace permllm::cpu {
namespace {

template <class CoreTuning, class BlockValue>
struct Int8Products {
  using Tuning = CoreTuning;
  using Value = BlockValue;
  using Element = uint8_t;
  using Rows = ExpandedRows<Tuning, Value>;

  static __m512i multiply(__m512i sum, __m512i tokens, __m512i weights) {
    return _mm512_dpbusd_epi32(sum, tokens, weights);
  }

  struct Inputs {
    explicit Inputs(const LinearArguments& arguments)
        : a(arguments), scales(a.token_scales), inverses(scales + measures()) {}

    // Those that fill the last vector included.
    int64_t measures() const { return ceil_div(a.m, kLanes) * kLanes; }

    void measure(int64_t t) const {
      if (t >= a.m) {
        scales[t] = 0.0f;
        return;
      }
      const TokenScale token(largest_magnitude(a, t), kLargest8);
      scales[t] = token.scale;
      inverses[t] = token.inverse;
    }

    __m512i load(int64_t token, int64_t first) const {
      return join(bytes(token, first), bytes(token, first + 32));
    }

    __m256i bytes(int64_t token, int64_t first) const {
      return _mm512_cvtepi16_epi8(quantize_inputs(a, token, first, inverses[token], kShift8));
    }

    const LinearArguments& a;
    float* scales;
    float* inverses;
  };

  struct Outputs {
    Outputs(const LinearArguments& arguments, const Inputs& inputs)
        : a(arguments), scales(inputs.scales) {}

    __m512 convert(__m512i sums, int64_t row, int64_t vector) const {
      // By lanes, since they wrap: `packed` may hold anything.
      const __m512i shifted = _mm512_mullo_epi32(_mm512_set1_epi32(a.behind.value_sums[row]),
                                                 _mm512_set1_epi32(kShift8));
      const __m512 scale = _mm512_set1_ps(row < a.n ? a.scale[row] : 0.0f);
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, shifted));
      return _mm512_mul_ps(_mm512_mul_ps(sum, scale), _mm512_load_ps(scales + vector * kLanes));
    }

    const LinearArguments& a;
    const float* scales;
  };
};

}  // namespace

template <class Tuning, class Value>
void avx512_int8_many_tokens(const LinearArguments& a, Worker& worker) {
  go_through_parts<ManyTokens<Int8Products<Tuning, Value>>>(a, worker);
}

template void avx512_int8_many_tokens<Avx512Bf16Tuning, int8_t>(const LinearArguments&, Worker&);
template void avx512_int8_many_tokens<Avx512Bf16Tuning, int4>(const LinearArguments&, Worker&);
template void avx512_int8_many_tokens<Avx512Bf16Tuning, dense8>(const LinearArguments&, Worker&);
template void avx512_int8_many_tokens<Zen5Tuning, int8_t>(const LinearArguments&, Worker&);
template void avx512_int8_many_tokens<Zen5Tuning, int4>(const LinearArguments&, Worker&);
template void avx512_int8_many_tokens<Zen5Tuning, dense8>(const LinearArguments&, Worker&);

}  // namespace permllm::cpu
