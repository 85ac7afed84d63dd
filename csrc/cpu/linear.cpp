#include "cpu/linear.h"

#include <type_traits>

#include "cpu/threads/region.h"
#include "cpu/tuning.h"

namespace permllm::cpu {
namespace {

using Run = void (*)(const LinearArguments&, Worker&);

#if defined(PERMLLM_AVX512)
template <class Tuning, int FewTokens, Run Few, Run Several, Run Many>
void by_tokens(const LinearArguments& a, Worker& worker) {
  constexpr int64_t kVector = Tuning::kSeveralTokens;
  const auto up_to_16 = [&](const LinearArguments& part) {
    part.m <= FewTokens ? Few(part, worker) : Several(part, worker);
  };
  if (a.m <= kVector) return up_to_16(a);
  const int64_t rest = a.m % kVector;
  const int64_t whole = rest <= Tuning::kRestTokens ? a.m - rest : a.m;
  (whole == kVector ? Several : Many)(part_of(a, 0, whole), worker);
  if (whole < a.m) up_to_16(part_of(a, whole, a.m - whole));
}

template <class Tuning, class Value, int FewTokens = Tuning::kFewTokens>
void avx512(const LinearArguments& a, Worker& worker) {
  by_tokens<Tuning, FewTokens, avx512_few_tokens<Tuning, Value, FewTokens>,
            avx512_several_tokens<Tuning, Value>, avx512_many_tokens<Tuning, Value>>(a, worker);
}

template <class Tuning, class Value, int FewTokens>
void avx512_int8(const LinearArguments& a, Worker& worker) {
  by_tokens<Tuning, FewTokens, avx512_int8_few_tokens<Tuning, Value, FewTokens>,
            avx512_int8_several_tokens<Tuning, Value>, avx512_int8_many_tokens<Tuning, Value>>(
      a, worker);
}

template <class Tuning>
void avx512_kept(const LinearArguments& a, Worker& worker) {
  a.m <= Tuning::kKeptFewTokens ? avx512_kept_few_tokens<Tuning>(a, worker)
                                : avx512_kept_many_tokens<Tuning>(a, worker);
}

template <class Tuning, class Value>
void avx512_int8_kept(const LinearArguments& a, Worker& worker) {
  constexpr int64_t kFew =
      std::is_same_v<Value, int4> ? Tuning::kKeptFewTokensInt4 : Tuning::kKeptFewTokensInt8;
  a.m <= kFew ? avx512_int8_kept_few_tokens<Tuning, Value>(a, worker)
              : avx512_int8_kept_many_tokens<Tuning, Value>(a, worker);
}
#endif

#if defined(PERMLLM_AMX)
template <class Value>
void amx(const LinearArguments& a, Worker& worker) {
  a.m <= AmxTuning::kFewTokens ? amx_few_tokens<Value>(a, worker)
                               : amx_many_tokens<Value>(a, worker);
}

template <class Value>
void amx_int8(const LinearArguments& a, Worker& worker) {
  if (a.m <= AmxTuning::kSplitTokens) return amx_int8_few_tokens<Value>(a, worker);
  a.m <= AmxTuning::kFewTokens ? amx_int8_several_tokens<Value>(a, worker)
                               : amx_int8_many_tokens<Value>(a, worker);
}
#endif

// That kernels in vectors of any width pack at a time.
constexpr int64_t kVectorTokens = Float32Tuning::kPackedTokens;

// What multiplies any number of tokens in float32, or nothing where nothing does.
template <class Real>
KernelOf<Real> float32_kernel(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Vnni:
    case Isa::kAvx512:
#if defined(PERMLLM_AVX512_FLOAT32)
      return {avx512_float32, kVectorTokens, sizeof(float)};
#else
      return {};
#endif
    case Isa::kAvx2Vnni:
    case Isa::kAvx2:
#if defined(PERMLLM_AVX2)
      return {avx2_masks, kVectorTokens, sizeof(float)};
#else
      return {};
#endif
    case Isa::kPortable:
      return {portable, kVectorTokens, sizeof(float)};
    default:
      return {};
  }
}

// The same of values in lanes.
template <class Value, int Of, class Real>
KernelOf<Real> lanes_kernel([[maybe_unused]] Isa isa) {
#if defined(PERMLLM_AVX2)
  if (has_lanes(isa)) return {avx2_float32<Value, Of, Real>, kVectorTokens, sizeof(float)};
#endif
  return {};
}

// The same of int8 values, which x of 16 bits meets as integers.
template <class Value, int Of, class Real>
KernelOf<Real> int8_lanes_kernel(Isa isa) {
  if constexpr (sizeof(Real) == sizeof(bf16)) {
    switch (isa) {
#if defined(PERMLLM_AVX2_VNNI)
      case Isa::kAvx2Vnni:
        return {avx2_vnni_int8<Value, Of, Real>, kVectorTokens, sizeof(Real)};
#endif
#if defined(PERMLLM_AVX2)
      case Isa::kAvx2:
        return {avx2_int8<Value, Of, Real>, kVectorTokens, sizeof(Real)};
#endif
      default:
        break;
    }
  }
  return lanes_kernel<Value, Of, Real>(isa);
}

// What multiplies dense rows of int8 with x of 16 bits in vectors of any width, or nothing.
template <class Real>
KernelOf<Real> dense8_kernel([[maybe_unused]] Isa isa) {
  if constexpr (sizeof(Real) == sizeof(bf16)) {
    switch (isa) {
#if defined(PERMLLM_AVX512_VNNI)
      case Isa::kAvx512Vnni:
        return {avx512_vnni<dense8, Real>, kVectorTokens, sizeof(Real)};
#endif
#if defined(PERMLLM_AVX2_VNNI)
      case Isa::kAvx2Vnni:
        return {avx2_vnni_dense8<Real>, kVectorTokens, sizeof(Real)};
#endif
#if defined(PERMLLM_AVX2)
      case Isa::kAvx512:
      case Isa::kAvx2:
        return {avx2_dense8<Real>, kVectorTokens, sizeof(Real)};
#endif
      default:
        break;
    }
  }
  return {};
}

// What multiplies sparse int8 values with masks in vectors of any width: integers where an
// instruction does so, else, as fast on avx512, in float32. On avx2 they are of few layers.
template <class Real>
KernelOf<Real> int8_kernel(Isa isa) {
#if defined(PERMLLM_AVX512_VNNI)
  if constexpr (sizeof(Real) == sizeof(bf16)) {
    if (isa == Isa::kAvx512Vnni) {
      return {avx512_vnni<int8_t, Real>, kVectorTokens, sizeof(Real)};
    }
  }
#endif
  return float32_kernel<Real>(isa);
}

// What multiplies values of this type in vectors of any width, or nothing.
template <class Real>
KernelOf<Real> vector_kernel(Isa isa, ValueType type) {
  switch (type) {
    case ValueType::kInt8:
      return int8_kernel<Real>(isa);
    case ValueType::kBfloat16:
      return float32_kernel<Real>(isa);
    case ValueType::kBfloat16Of4:
      return lanes_kernel<bf16, 4, Real>(isa);
    case ValueType::kBfloat16Of16:
      return lanes_kernel<bf16, 16, Real>(isa);
    case ValueType::kInt8Of4:
      return int8_lanes_kernel<int8_t, 4, Real>(isa);
    case ValueType::kInt8Of16:
      return int8_lanes_kernel<int8_t, 16, Real>(isa);
    case ValueType::kInt4Of4:
      return int8_lanes_kernel<int4, 4, Real>(isa);
    case ValueType::kInt4Of16:
      return int8_lanes_kernel<int4, 16, Real>(isa);
    case ValueType::kDense8:
      return dense8_kernel<Real>(isa);
    case ValueType::kBfloat12:
    case ValueType::kDense12:
    case ValueType::kInt4:
    case ValueType::kGroupedBfloat12:
    case ValueType::kGroupedInt8:
    case ValueType::kGroupedInt4:
      break;
  }
  return {};
}

#if defined(PERMLLM_AVX512) || defined(PERMLLM_AMX)
// Few float16 in two parts each: memory is the bound there, not the second product.
template <class Tuning, Run Multiply>
void in_parts(const LinearArguments& a, Worker& worker) {
  if (a.m > Tuning::kPartTokens) return Multiply(a, worker);
  LinearArguments parts = a;
  parts.parts = 2;
  parts.m *= 2;
  Multiply(parts, worker);
}

// x of int8 values is an integer of at most two bytes, float16 that meets bfloat16 at most two
// bfloat16.
template <class Tuning, Run Int8>
KernelOf<bf16> of_integers() {
  return {Int8, Tuning::kPackedTokens, sizeof(bf16)};
}

template <class Tuning, Run Bfloat16>
KernelOf<bf16> of_words(bool half) {
  if (half) return {in_parts<Tuning, Bfloat16>, Tuning::kPackedTokens, 2 * sizeof(bf16)};
  return {Bfloat16, Tuning::kPackedTokens, sizeof(bf16)};
}
#endif

#if defined(PERMLLM_AVX512)
// Of int8 values. `Groups`: of an instruction set that has them (isa.h).
template <class Tuning, bool Groups>
KernelOf<bf16> avx512_int8_kernel(ValueType type) {
  if constexpr (Groups) {
    if (type == ValueType::kGroupedInt8)
      return of_integers<Tuning, avx512_int8_kept<Tuning, int8_t>>();
    if (type == ValueType::kGroupedInt4)
      return of_integers<Tuning, avx512_int8_kept<Tuning, int4>>();
  }
  switch (type) {
    case ValueType::kInt8:
      return of_integers<Tuning, avx512_int8<Tuning, int8_t, Tuning::kFewTokensInt8>>();
    case ValueType::kInt4:
      return of_integers<Tuning, avx512_int8<Tuning, int4, Tuning::kFewTokensInt8>>();
    case ValueType::kDense8:
      return of_integers<Tuning, avx512_int8<Tuning, dense8, Tuning::kFewTokensDense8>>();
    default:
      return {};
  }
}

// Of an instruction set that has groups.
template <class Tuning>
KernelOf<bf16> avx512_kernel(ValueType type, bool half) {
  switch (type) {
    case ValueType::kBfloat16:
      return of_words<Tuning, avx512<Tuning, bf16>>(half);
    case ValueType::kGroupedBfloat12:
      return of_words<Tuning, avx512_kept<Tuning>>(half);
    case ValueType::kDense12:
      return of_words<Tuning, avx512<Tuning, dense12, Tuning::kFewTokensDense>>(half);
    default:
      return avx512_int8_kernel<Tuning, true>(type);
  }
}
#endif

#if defined(PERMLLM_AMX)
KernelOf<bf16> amx_kernel(ValueType type, bool half) {
  switch (type) {
    case ValueType::kInt8:
      return of_integers<AmxTuning, amx_int8<int8_t>>();
    case ValueType::kInt4:
      return of_integers<AmxTuning, amx_int8<int4>>();
    case ValueType::kDense8:
      return of_integers<AmxTuning, amx_int8<dense8>>();
    case ValueType::kBfloat16:
      return of_words<AmxTuning, amx<bf16>>(half);
    case ValueType::kBfloat12:
      return of_words<AmxTuning, amx<bf12>>(half);
    case ValueType::kDense12:
      return of_words<AmxTuning, amx<dense12>>(half);
    default:
      return {};
  }
}
#endif

// The same for bfloat16, or with `half` for float16, in bfloat16 or int8 where the instruction set
// multiplies those.
KernelOf<bf16> words_kernel(Isa isa, [[maybe_unused]] ValueType type, [[maybe_unused]] bool half) {
  switch (isa) {
    case Isa::kAmx:
#if defined(PERMLLM_AMX)
      return amx_kernel(type, half);
#else
      return {};
#endif
    case Isa::kAvx512Bf16:
#if defined(PERMLLM_AVX512)
      return avx512_kernel<Avx512Bf16Tuning>(type, half);
#else
      return {};
#endif
    case Isa::kAvx512Vbmi2:
#if defined(PERMLLM_AVX512)
      return avx512_int8_kernel<Avx512Bf16Tuning, false>(type);
#else
      return {};
#endif
    case Isa::kZen5:
#if defined(PERMLLM_AVX512)
      return avx512_kernel<Zen5Tuning>(type, half);
#else
      return {};
#endif
    default:
      return vector_kernel<bf16>(isa, type);
  }
}

// The same call, its float16 as words of 16 bits.
LinearArguments in_words(const LinearOf<fp16>& a) {
  const auto words = [](auto* halves) { return reinterpret_cast<const bf16*>(halves); };
  LinearArguments same{words(a.x), a.x_stride, a.m,           a.packed,
                       a.n,        a.k,        words(a.bias), reinterpret_cast<bf16*>(a.y),
                       a.scale,    a.behind,   a.packed_x,    a.token_scales};
  same.half = true;
  same.last = a.last;
  return same;
}

// Calls body(kernel, arguments) with the kernel for this type of x, and the arguments as it takes
// them.
template <class Real, class Body>
void with_kernel(Isa isa, ValueType type, const LinearOf<Real>& a, Body body) {
  if constexpr (std::is_same_v<Real, bf16>) {
    body(words_kernel(isa, type, a.half), a);
  } else {
    if (const auto kernel = vector_kernel<Real>(isa, type); kernel.run != nullptr) {
      return body(kernel, a);
    }
    if constexpr (std::is_same_v<Real, fp16>) body(words_kernel(isa, type, true), in_words(a));
  }
}

}  // namespace

bool has_kernel(Isa isa, ValueType type) { return words_kernel(isa, type, false).run != nullptr; }

bool takes_float32(Isa isa, ValueType type) {
  return vector_kernel<float>(isa, type).run != nullptr;
}

template <class Real>
void linear(Isa isa, ValueType type, const LinearOf<Real>& a, const int32_t* gather) {
  with_kernel(isa, type, a,
              [&](const auto& kernel, const auto& own) { run_in_region(kernel, own, gather); });
}

template <class Real>
void multiply(Isa isa, ValueType type, const LinearOf<Real>& a, Worker& worker) {
  with_kernel(isa, type, a, [&](const auto& kernel, const auto& own) { kernel.run(own, worker); });
}

template <class Real>
InputMemory input_memory(Isa isa, ValueType type, int64_t m, int64_t k) {
  InputMemory memory;
  with_kernel(isa, type, LinearOf<Real>{},
              [&](const auto& kernel, const auto&) { memory = input_memory(kernel, m, k); });
  return memory;
}

template void multiply(Isa, ValueType, const LinearOf<bf16>&, Worker&);
template void multiply(Isa, ValueType, const LinearOf<fp16>&, Worker&);
template void multiply(Isa, ValueType, const LinearOf<float>&, Worker&);
template InputMemory input_memory<bf16>(Isa, ValueType, int64_t, int64_t);
template InputMemory input_memory<fp16>(Isa, ValueType, int64_t, int64_t);
template InputMemory input_memory<float>(Isa, ValueType, int64_t, int64_t);
template void linear(Isa, ValueType, const LinearOf<bf16>&, const int32_t*);
template void linear(Isa, ValueType, const LinearOf<fp16>&, const int32_t*);
template void linear(Isa, ValueType, const LinearOf<float>&, const int32_t*);

}  // namespace permllm::cpu
