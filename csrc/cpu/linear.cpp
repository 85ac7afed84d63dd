#include "linear.h"

#include <algorithm>
#include <type_traits>

#include "scratch.h"
#include "threads.h"
#include "tuning.h"

namespace permllm::cpu {
namespace {

template <class Real>
using KernelOf = void (*)(const LinearOf<Real>&);
using Kernel = KernelOf<bf16>;

template <class Real>
LinearOf<Real> tokens(const LinearOf<Real>& a, int64_t first, int64_t count) {
  LinearOf<Real> part = a;
  part.x += first * a.x_stride;
  part.y += first * a.n;
  part.m = count;
  return part;
}

#if defined(PERMLLM_AVX512)
template <Kernel Few, Kernel Several, Kernel Many>
void avx512(const LinearArguments& a) {
  using Tuning = Avx512Bf16Tuning;
  constexpr int64_t kVector = Tuning::kSeveralTokens;
  const auto up_to_16 = [](const LinearArguments& part) {
    part.m <= Tuning::kFewTokens ? Few(part) : Several(part);
  };
  if (a.m <= kVector) return up_to_16(a);
  const int64_t rest = a.m % kVector;
  const int64_t whole = rest <= Tuning::kRestTokens ? a.m - rest : a.m;
  whole == kVector ? Several(tokens(a, 0, whole)) : Many(tokens(a, 0, whole));
  if (whole < a.m) up_to_16(tokens(a, whole, a.m - whole));
}
#endif

#if defined(PERMLLM_AMX)
void amx(const LinearArguments& a) {
  a.m <= AmxTuning::kFewTokens ? amx_few_tokens(a) : amx_many_tokens(a);
}

void amx_int8(const LinearArguments& a) {
  a.m <= AmxTuning::kSplitTokens ? amx_int8_few_tokens(a) : amx_int8_many_tokens(a);
}
#endif

// What multiplies any number of tokens in float32, or null where nothing does.
template <class Real>
KernelOf<Real> float32_kernel(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
#if defined(PERMLLM_AVX512_FLOAT32)
      return avx512_float32;
#else
      return nullptr;
#endif
    case Isa::kAvx2:
#if defined(PERMLLM_AVX2)
      return avx2_float32;
#else
      return nullptr;
#endif
    case Isa::kPortable:
      return portable;
    default:
      return nullptr;
  }
}

// The same, in bfloat16 or int8 where the instruction set multiplies those.
Kernel bfloat16_kernel(Isa isa, ValueType type) {
  const bool bfloat16 = type == ValueType::kBfloat16;
  switch (isa) {
    case Isa::kAmx:
#if defined(PERMLLM_AMX)
      return bfloat16 ? amx : amx_int8;
#else
      return nullptr;
#endif
    case Isa::kAvx512Bf16:
#if defined(PERMLLM_AVX512)
      return bfloat16 ? avx512<avx512_few_tokens, avx512_several_tokens, avx512_many_tokens>
                      : avx512<avx512_int8_few_tokens, avx512_int8_several_tokens,
                               avx512_int8_many_tokens>;
#else
      return nullptr;
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

template <class Real>
void gather_inputs(const LinearOf<Real>& a, const int32_t* gather, Real* target) {
  parallel_for(a.m, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Real* source = a.x + t * a.x_stride;
      for (int64_t i = 0; i < a.k; ++i) target[t * a.k + i] = source[gather[i]];
    }
  });
}

}  // namespace

bool has_kernel(Isa isa, ValueType type) { return bfloat16_kernel(isa, type) != nullptr; }

bool takes_every_type(Isa isa) { return float32_kernel<float>(isa) != nullptr; }

template <class Real>
void linear(Isa isa, ValueType type, const LinearOf<Real>& arguments, const int32_t* gather) {
  const KernelOf<Real> multiply = kernel<Real>(isa, type);
  if (gather == nullptr) return multiply(arguments);
  constexpr int64_t kTokens = CommonTuning::kGatheredTokens;
  for (int64_t first = 0; first < arguments.m; first += kTokens) {
    LinearOf<Real> part = tokens(arguments, first, std::min(kTokens, arguments.m - first));
    auto* gathered =
        static_cast<Real*>(thread_scratch(Scratch::kGathered, part.m * part.k * sizeof(Real)));
    gather_inputs(part, gather, gathered);
    part.x = gathered;
    part.x_stride = part.k;
    multiply(part);
  }
}

template void linear(Isa, ValueType, const LinearOf<bf16>&, const int32_t*);
template void linear(Isa, ValueType, const LinearOf<fp16>&, const int32_t*);
template void linear(Isa, ValueType, const LinearOf<float>&, const int32_t*);

}  // namespace permllm::cpu
