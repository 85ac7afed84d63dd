#include "linear.h"

#include <type_traits>

#include "region.h"
#include "tuning.h"

namespace permllm::cpu {
namespace {

#if defined(PERMLLM_AVX512)
using Run = void (*)(const LinearArguments&, Worker&);

template <class Tuning, Run Few, Run Several, Run Many>
void by_tokens(const LinearArguments& a, Worker& worker) {
  constexpr int64_t kVector = Tuning::kSeveralTokens;
  const auto up_to_16 = [&](const LinearArguments& part) {
    part.m <= Tuning::kFewTokens ? Few(part, worker) : Several(part, worker);
  };
  if (a.m <= kVector) return up_to_16(a);
  const int64_t rest = a.m % kVector;
  const int64_t whole = rest <= Tuning::kRestTokens ? a.m - rest : a.m;
  (whole == kVector ? Several : Many)(part_of(a, 0, whole), worker);
  if (whole < a.m) up_to_16(part_of(a, whole, a.m - whole));
}

template <class Tuning>
KernelOf<bf16> avx512(ValueType type) {
  const Run run =
      type == ValueType::kBfloat16
          ? by_tokens<Tuning, avx512_few_tokens<Tuning>, avx512_several_tokens<Tuning>,
                      avx512_many_tokens<Tuning>>
          : by_tokens<Tuning, avx512_int8_few_tokens<Tuning>, avx512_int8_several_tokens<Tuning>,
                      avx512_int8_many_tokens<Tuning>>;
  return {run, Tuning::kPackedTokens, sizeof(bf16)};
}
#endif

#if defined(PERMLLM_AMX)
void amx(const LinearArguments& a, Worker& worker) {
  a.m <= AmxTuning::kFewTokens ? amx_few_tokens(a, worker) : amx_many_tokens(a, worker);
}

void amx_int8(const LinearArguments& a, Worker& worker) {
  if (a.m <= AmxTuning::kSplitTokens) return amx_int8_few_tokens(a, worker);
  a.m <= AmxTuning::kFewTokens ? amx_int8_several_tokens(a, worker)
                               : amx_int8_many_tokens(a, worker);
}
#endif

// What multiplies any number of tokens in float32, or nothing where nothing does.
template <class Real>
KernelOf<Real> float32_kernel(Isa isa) {
  constexpr int64_t kTokens = Float32Tuning::kPackedTokens, kBytes = sizeof(float);
  switch (isa) {
    case Isa::kAvx512:
#if defined(PERMLLM_AVX512_FLOAT32)
      return {avx512_float32, kTokens, kBytes};
#else
      return {};
#endif
    case Isa::kAvx2:
#if defined(PERMLLM_AVX2)
      return {avx2_float32, kTokens, kBytes};
#else
      return {};
#endif
    case Isa::kPortable:
      return {portable, kTokens, kBytes};
    default:
      return {};
  }
}

// The same, in bfloat16 or int8 where the instruction set multiplies those. x of int8 values is an
// integer of at most two bytes.
KernelOf<bf16> bfloat16_kernel(Isa isa, ValueType type) {
  [[maybe_unused]] constexpr int64_t kBytes = sizeof(bf16);
  [[maybe_unused]] const bool bfloat16 = type == ValueType::kBfloat16;
  switch (isa) {
    case Isa::kAmx:
#if defined(PERMLLM_AMX)
      return {bfloat16 ? amx : amx_int8, AmxTuning::kPackedTokens, kBytes};
#else
      return {};
#endif
    case Isa::kAvx512Bf16:
    case Isa::kZen5:
#if defined(PERMLLM_AVX512)
      return isa == Isa::kZen5 ? avx512<Zen5Tuning>(type) : avx512<Avx512Bf16Tuning>(type);
#else
      return {};
#endif
    default:
      return float32_kernel<bf16>(isa);
  }
}

template <class Real>
KernelOf<Real> kernel(Isa isa, ValueType type) {
  if constexpr (std::is_same_v<Real, bf16>) {
    return bfloat16_kernel(isa, type);
  } else {
    return float32_kernel<Real>(isa);
  }
}

}  // namespace

bool has_kernel(Isa isa, ValueType type) { return bfloat16_kernel(isa, type).run != nullptr; }

bool takes_every_type(Isa isa) { return float32_kernel<float>(isa).run != nullptr; }

template <class Real>
void linear(Isa isa, ValueType type, const LinearOf<Real>& arguments, const int32_t* gather) {
  run_in_region(kernel<Real>(isa, type), arguments, gather);
}

template void linear(Isa, ValueType, const LinearOf<bf16>&, const int32_t*);
template void linear(Isa, ValueType, const LinearOf<fp16>&, const int32_t*);
template void linear(Isa, ValueType, const LinearOf<float>&, const int32_t*);

}  // namespace permllm::cpu
