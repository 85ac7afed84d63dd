// AVX-512 and AVX-VNNI in software: included before every source of the kernels that asks for them,
// which is then compiled for AVX2. Same results as the hardware, bit by bit (Intel's instruction
// set reference), but for what it leaves undefined, which is filled with bytes that no test can
// miss, and for the order in which `reduce_add` adds. Loads and stores that must be aligned check
// it.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

#pragma GCC diagnostic ignored "-Wpsabi"

namespace avx512_emulation {

template <class T, class Vector = __m512i>
using Lanes = std::array<T, sizeof(Vector) / sizeof(T)>;

template <class T, class Vector>
inline Lanes<T, Vector> lanes(Vector vector) {
  Lanes<T, Vector> found;
  std::memcpy(&found, &vector, sizeof(vector));
  return found;
}

// A vector whose lane i is f(i).
template <class T, class Vector = __m512i, class F>
inline Vector each(F f) {
  Lanes<T, Vector> made;
  for (int i = 0; i < static_cast<int>(made.size()); ++i) made[i] = static_cast<T>(f(i));
  Vector vector;
  std::memcpy(&vector, &made, sizeof(vector));
  return vector;
}

template <class To, class From>
inline To cast(From from) {
  To to;
  std::memset(&to, 0xcc, sizeof(to));
  std::memcpy(&to, &from, std::min(sizeof(to), sizeof(from)));
  return to;
}

template <class Vector, int Alignment = 1>
inline Vector load(const void* memory) {
  if (reinterpret_cast<uintptr_t>(memory) % Alignment != 0) {
    std::fprintf(stderr, "aligned load of %p\n", memory);
    std::abort();
  }
  Vector vector;
  std::memcpy(&vector, memory, sizeof(vector));
  return vector;
}

template <class Vector, int Alignment = 1>
inline void store(void* memory, Vector vector) {
  if (reinterpret_cast<uintptr_t>(memory) % Alignment != 0) {
    std::fprintf(stderr, "aligned store of %p\n", memory);
    std::abort();
  }
  std::memcpy(memory, &vector, sizeof(vector));
}

inline bool bit(uint64_t mask, int i) { return (mask >> i & 1) != 0; }

// Reads no lane that the mask leaves out.
template <class T, class Vector>
inline Vector load_masked(uint64_t mask, const void* memory) {
  const auto* from = static_cast<const char*>(memory);
  return each<T, Vector>([&](int i) {
    T value{};
    if (bit(mask, i)) std::memcpy(&value, from + i * sizeof(T), sizeof(T));
    return value;
  });
}

template <class T, class Vector>
inline void store_masked(void* memory, uint64_t mask, Vector vector) {
  const auto from = lanes<T>(vector);
  auto* to = static_cast<char*>(memory);
  for (int i = 0; i < static_cast<int>(from.size()); ++i) {
    if (bit(mask, i)) std::memcpy(to + i * sizeof(T), &from[i], sizeof(T));
  }
}

template <class T, class Vector>
inline Vector choose(uint64_t mask, Vector otherwise, Vector chosen) {
  const auto a = lanes<T>(otherwise), b = lanes<T>(chosen);
  return each<T, Vector>([&](int i) { return bit(mask, i) ? b[i] : a[i]; });
}

template <class T, class F>
inline __m512i map(__m512i vector, F f) {
  const auto a = lanes<T>(vector);
  return each<T>([&](int i) { return f(a[i]); });
}

template <class T, class F>
inline __m512i map(__m512i first, __m512i second, F f) {
  const auto a = lanes<T>(first), b = lanes<T>(second);
  return each<T>([&](int i) { return f(a[i], b[i]); });
}

template <class F>
inline __m512 map(__m512 first, __m512 second, F f) {
  const auto a = lanes<float>(first), b = lanes<float>(second);
  return each<float, __m512>([&](int i) { return f(a[i], b[i]); });
}

// Each lane of T of `from` widened or cut to a lane of To.
template <class To, class Vector, class T, class From>
inline Vector convert(From from) {
  const auto a = lanes<T>(from);
  return each<To, Vector>([&](int i) { return static_cast<To>(a[i]); });
}

template <class T>
inline __m512i unpack(__m512i first, __m512i second, int half) {
  const auto a = lanes<T>(first), b = lanes<T>(second);
  constexpr int kOfQuarter = 16 / sizeof(T);
  return each<T>([&](int i) {
    const int from = i / kOfQuarter * kOfQuarter + half * kOfQuarter / 2 + i % kOfQuarter / 2;
    return i % 2 == 0 ? a[from] : b[from];
  });
}

template <class T, class Vector>
inline Vector permute(Vector order, Vector vector) {
  const auto o = lanes<T>(order), a = lanes<T>(vector);
  return each<T, Vector>([&](int i) { return a[o[i] % a.size()]; });
}

template <class T>
inline __m512i permute(__m512i first, __m512i order, __m512i second) {
  const auto o = lanes<T>(order), a = lanes<T>(first), b = lanes<T>(second);
  return each<T>([&](int i) {
    const auto from = o[i] % (2 * a.size());
    return from < a.size() ? a[from] : b[from - a.size()];
  });
}

inline __m512i shuffle_quarters(__m512i first, __m512i second, int order) {
  const auto a = lanes<std::array<char, 16>>(first), b = lanes<std::array<char, 16>>(second);
  Lanes<std::array<char, 16>> made;
  for (int i = 0; i < 4; ++i) made[i] = (i < 2 ? a : b)[order >> (2 * i) & 3];
  return cast<__m512i>(made);
}

inline __m512i shuffle_bytes(__m512i vector, __m512i order) {
  const auto a = lanes<uint8_t>(vector), o = lanes<uint8_t>(order);
  return each<uint8_t>([&](int i) { return o[i] & 0x80 ? 0 : a[i / 16 * 16 + o[i] % 16]; });
}

template <class T>
inline __m512i expand(__m512i otherwise, uint64_t mask, __m512i vector) {
  const auto a = lanes<T>(vector), b = lanes<T>(otherwise);
  int next = 0;
  return each<T>([&](int i) { return bit(mask, i) ? a[next++] : b[i]; });
}

template <class Part, class Vector>
inline Vector insert(Vector vector, Part part, int place) {
  std::memcpy(reinterpret_cast<char*>(&vector) + place * sizeof(Part), &part, sizeof(Part));
  return vector;
}

inline __m512i ternary(__m512i first, __m512i second, __m512i third, int table) {
  const auto a = lanes<uint64_t>(first), b = lanes<uint64_t>(second), c = lanes<uint64_t>(third);
  return each<uint64_t>([&](int i) {
    uint64_t result = 0;
    for (int place = 0; place < 8; ++place) {
      if (!bit(table, place)) continue;
      result |=
          (place & 4 ? a[i] : ~a[i]) & (place & 2 ? b[i] : ~b[i]) & (place & 1 ? c[i] : ~c[i]);
    }
    return result;
  });
}

inline __mmask16 compare(__m512 first, __m512 second, int predicate) {
  const auto a = lanes<float>(first), b = lanes<float>(second);
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) {
    const bool unordered = std::isnan(a[i]) || std::isnan(b[i]);
    bool holds = false;
    switch (predicate) {
      case _CMP_UNORD_Q:
        holds = unordered;
        break;
      case _CMP_NEQ_UQ:
        holds = unordered || a[i] != b[i];
        break;
      default:
        std::abort();
    }
    mask |= static_cast<uint32_t>(holds) << i;
  }
  return static_cast<__mmask16>(mask);
}

inline int32_t nearest(float value) {
  if (!(value >= -2147483648.0f && value < 2147483648.0f)) return INT32_MIN;
  return static_cast<int32_t>(std::nearbyintf(value));
}

inline float flushed(float value) {
  return std::fabs(value) < std::numeric_limits<float>::min() ? std::copysign(0.0f, value) : value;
}

inline float from_bfloat16(uint16_t word) {
  return flushed(std::bit_cast<float>(static_cast<uint32_t>(word) << 16));
}

inline uint16_t to_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(flushed(value));
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The odd input of a pair first, each with one rounding.
inline __m512 dot_bfloat16(__m512 sums, __m512i first, __m512i second) {
  const auto s = lanes<float>(sums);
  const auto a = lanes<uint16_t>(first), b = lanes<uint16_t>(second);
  return each<float, __m512>([&](int i) {
    float sum = flushed(s[i]);
    for (const int place : {2 * i + 1, 2 * i}) {
      sum = flushed(std::fma(from_bfloat16(a[place]), from_bfloat16(b[place]), sum));
    }
    return sum;
  });
}

template <class Vector>
inline Vector dot_bytes(Vector sums, Vector first, Vector second) {
  const auto s = lanes<uint32_t>(sums);
  const auto a = lanes<uint8_t>(first);
  const auto b = lanes<int8_t>(second);
  return each<uint32_t, Vector>([&](int i) {
    uint32_t sum = s[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j) sum += static_cast<uint32_t>(a[j] * b[j]);
    return sum;
  });
}

inline __m256i to_half(__m512 vector, int rounding) {
  if (rounding != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) std::abort();
  const auto halves = lanes<__m256>(vector);
  const std::array<__m128i, 2> made = {_mm256_cvtps_ph(halves[0], _MM_FROUND_TO_NEAREST_INT),
                                       _mm256_cvtps_ph(halves[1], _MM_FROUND_TO_NEAREST_INT)};
  return cast<__m256i>(made);
}

inline __m512 from_half(__m256i words) {
  const auto halves = lanes<__m128i>(words);
  const std::array<__m256, 2> made = {_mm256_cvtph_ps(halves[0]), _mm256_cvtph_ps(halves[1])};
  return cast<__m512>(made);
}

template <class Part>
inline __m512i repeat(Part part) {
  std::array<Part, sizeof(__m512i) / sizeof(Part)> made;
  made.fill(part);
  return cast<__m512i>(made);
}

inline __m256i to_bfloat16s(__m512 vector) {
  const auto a = lanes<float>(vector);
  return each<uint16_t, __m256i>([&](int i) { return to_bfloat16(a[i]); });
}

// What follows has the names and arguments of the intrinsics.

using V = __m512i;
using F = __m512;
using Mask = uint64_t;

inline V mm512_load_si512(const void* p) { return load<__m512i, 64>(p); }
inline V mm512_loadu_si512(const void* p) { return load<__m512i>(p); }
inline F mm512_load_ps(const void* p) { return load<__m512, 64>(p); }
inline F mm512_loadu_ps(const void* p) { return load<__m512>(p); }
inline void mm512_store_si512(void* p, V a) { store<V, 64>(p, a); }
inline void mm512_storeu_si512(void* p, V a) { store<V>(p, a); }
inline void mm512_store_ps(void* p, F a) { store<F, 64>(p, a); }
inline void mm512_storeu_ps(void* p, F a) { store<F>(p, a); }
inline __m512i mm512_maskz_loadu_epi16(Mask k, const void* p) {
  return load_masked<uint16_t, __m512i>(k, p);
}
inline __m512i mm512_maskz_loadu_epi8(Mask k, const void* p) {
  return load_masked<uint8_t, __m512i>(k, p);
}
inline __m512 mm512_maskz_loadu_ps(Mask k, const void* p) {
  return load_masked<float, __m512>(k, p);
}
inline __m256i mm256_maskz_loadu_epi16(Mask k, const void* p) {
  return load_masked<uint16_t, __m256i>(k, p);
}
inline __m256 mm256_maskz_loadu_ps(Mask k, const void* p) {
  return load_masked<float, __m256>(k, p);
}
inline __m128i mm_maskz_loadu_epi16(Mask k, const void* p) {
  return load_masked<uint16_t, __m128i>(k, p);
}
inline void mm512_mask_storeu_epi16(void* p, Mask k, __m512i a) { store_masked<uint16_t>(p, k, a); }
inline void mm512_mask_storeu_epi32(void* p, Mask k, __m512i a) { store_masked<uint32_t>(p, k, a); }
inline void mm512_mask_storeu_ps(void* p, Mask k, __m512 a) { store_masked<float>(p, k, a); }
inline void mm256_mask_storeu_epi16(void* p, Mask k, __m256i a) { store_masked<uint16_t>(p, k, a); }
inline void mm256_mask_storeu_ps(void* p, Mask k, __m256 a) { store_masked<float>(p, k, a); }
inline void mm_mask_storeu_epi16(void* p, Mask k, __m128i a) { store_masked<uint16_t>(p, k, a); }
inline V mm512_setzero_si512() { return V{}; }
inline F mm512_setzero_ps() { return F{}; }
inline V mm512_set1_epi8(uint8_t a) { return repeat(a); }
inline V mm512_set1_epi16(uint16_t a) { return repeat(a); }
inline V mm512_set1_epi32(uint32_t a) { return repeat(a); }
inline V mm512_set1_epi64(uint64_t a) { return repeat(a); }
inline F mm512_set1_ps(float a) { return cast<F>(repeat(a)); }
inline V mm512_set_epi64(int64_t h, int64_t g, int64_t f, int64_t e, int64_t d, int64_t c,
                         int64_t b, int64_t a) {
  return cast<V>(Lanes<int64_t>{a, b, c, d, e, f, g, h});
}
inline V mm512_set4_epi64(int64_t d, int64_t c, int64_t b, int64_t a) {
  return mm512_set_epi64(d, c, b, a, d, c, b, a);
}
inline V mm512_maskz_mov_epi8(Mask k, V a) { return choose<uint8_t>(k, V{}, a); }
inline V mm512_maskz_set1_epi8(Mask k, uint8_t a) { return choose<uint8_t>(k, V{}, repeat(a)); }
inline V mm512_maskz_set1_epi16(Mask k, uint16_t a) { return choose<uint16_t>(k, V{}, repeat(a)); }
inline __m512 mm512_castsi512_ps(__m512i a) { return cast<__m512>(a); }
inline __m512i mm512_castps_si512(__m512 a) { return cast<__m512i>(a); }
inline __m512i mm512_castsi256_si512(__m256i a) { return cast<__m512i>(a); }
inline __m512i mm512_castsi128_si512(__m128i a) { return cast<__m512i>(a); }
inline __m256i mm512_castsi512_si256(__m512i a) { return cast<__m256i>(a); }
inline __m128i mm512_castsi512_si128(__m512i a) { return cast<__m128i>(a); }
inline __m256 mm512_castps512_ps256(__m512 a) { return cast<__m256>(a); }
inline __m512 mm512_castps256_ps512(__m256 a) { return cast<__m512>(a); }
inline V mm512_zextsi256_si512(__m256i a) { return insert(V{}, a, 0); }
inline F mm512_add_ps(F a, F b) {
  return map(a, b, [](float x, float y) { return x + y; });
}
inline F mm512_sub_ps(F a, F b) {
  return map(a, b, [](float x, float y) { return x - y; });
}
inline F mm512_mul_ps(F a, F b) {
  return map(a, b, [](float x, float y) { return x * y; });
}
inline F mm512_maskz_sub_ps(Mask k, F a, F b) { return choose<float>(k, F{}, mm512_sub_ps(a, b)); }
inline F mm512_fmadd_ps(F a, F b, F c) {
  const auto x = lanes<float>(a), y = lanes<float>(b), z = lanes<float>(c);
  return each<float, F>([&](int i) { return std::fma(x[i], y[i], z[i]); });
}
inline V mm512_add_epi8(V a, V b) {
  return map<uint8_t>(a, b, [](uint8_t x, uint8_t y) { return x + y; });
}
inline V mm512_add_epi16(V a, V b) {
  return map<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return x + y; });
}
inline V mm512_add_epi32(V a, V b) {
  return map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x + y; });
}
inline V mm512_sub_epi32(V a, V b) {
  return map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x - y; });
}
inline V mm512_mullo_epi16(V a, V b) {
  return map<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return uint32_t{x} * y; });
}
inline V mm512_mullo_epi32(V a, V b) {
  return map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x * y; });
}
inline V mm512_mullo_epi64(V a, V b) {
  return map<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x * y; });
}
inline V mm512_max_epu16(V a, V b) {
  return map<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return std::max(x, y); });
}
inline V mm512_max_epu32(V a, V b) {
  return map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return std::max(x, y); });
}
inline V mm512_and_si512(V a, V b) {
  return map<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x & y; });
}
inline V mm512_or_si512(V a, V b) {
  return map<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x | y; });
}
inline V mm512_xor_si512(V a, V b) {
  return map<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x ^ y; });
}
inline V mm512_maskz_subs_epu8(Mask k, V a, V b) {
  return choose<uint8_t>(
      k, V{}, map<uint8_t>(a, b, [](uint8_t x, uint8_t y) { return x > y ? x - y : 0; }));
}
inline uint32_t mm512_reduce_max_epu32(V a) {
  const auto x = lanes<uint32_t>(a);
  return *std::max_element(x.begin(), x.end());
}
inline float mm512_reduce_add_ps(F a) {
  auto x = lanes<float>(a);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}
inline V mm512_mask_or_epi32(V s, Mask k, V a, V b) {
  return choose<uint32_t>(k, s, mm512_or_si512(a, b));
}
inline V mm512_ternarylogic_epi32(V a, V b, V c, int table) { return ternary(a, b, c, table); }
inline V mm512_ternarylogic_epi64(V a, V b, V c, int table) { return ternary(a, b, c, table); }
inline V mm512_slli_epi16(V a, unsigned n) {
  return map<uint16_t>(a, [=](uint16_t x) { return n < 16 ? x << n : 0; });
}
inline V mm512_slli_epi32(V a, unsigned n) {
  return map<uint32_t>(a, [=](uint32_t x) { return n < 32 ? x << n : 0; });
}
inline V mm512_slli_epi64(V a, unsigned n) {
  return map<uint64_t>(a, [=](uint64_t x) { return n < 64 ? x << n : 0; });
}
inline V mm512_srli_epi16(V a, unsigned n) {
  return map<uint16_t>(a, [=](uint16_t x) { return n < 16 ? x >> n : 0; });
}
inline V mm512_srli_epi32(V a, unsigned n) {
  return map<uint32_t>(a, [=](uint32_t x) { return n < 32 ? x >> n : 0; });
}
inline V mm512_srli_epi64(V a, unsigned n) {
  return map<uint64_t>(a, [=](uint64_t x) { return n < 64 ? x >> n : 0; });
}
inline V mm512_shuffle_i32x4(V a, V b, int order) { return shuffle_quarters(a, b, order); }
inline V mm512_shuffle_i64x2(V a, V b, int order) { return shuffle_quarters(a, b, order); }
inline V mm512_shuffle_epi8(V a, V order) { return shuffle_bytes(a, order); }
inline V mm512_maskz_shuffle_epi8(Mask k, V a, V order) {
  return choose<uint8_t>(k, V{}, shuffle_bytes(a, order));
}
inline __m256i mm256_permutexvar_epi8(__m256i order, __m256i a) {
  return permute<uint8_t>(order, a);
}
inline V mm512_permutexvar_epi8(V order, V a) { return permute<uint8_t>(order, a); }
inline V mm512_permutexvar_epi16(V order, V a) { return permute<uint16_t>(order, a); }
inline V mm512_permutexvar_epi64(V order, V a) { return permute<uint64_t>(order, a); }
inline V mm512_maskz_permutexvar_epi16(Mask k, V order, V a) {
  return choose<uint16_t>(k, V{}, permute<uint16_t>(order, a));
}
inline V mm512_permutex2var_epi8(V a, V order, V b) { return permute<uint8_t>(a, order, b); }
inline V mm512_permutex2var_epi16(V a, V order, V b) { return permute<uint16_t>(a, order, b); }
inline V mm512_unpacklo_epi8(V a, V b) { return unpack<uint8_t>(a, b, 0); }
inline V mm512_unpackhi_epi8(V a, V b) { return unpack<uint8_t>(a, b, 1); }
inline V mm512_unpacklo_epi32(V a, V b) { return unpack<uint32_t>(a, b, 0); }
inline V mm512_unpackhi_epi32(V a, V b) { return unpack<uint32_t>(a, b, 1); }
inline V mm512_unpacklo_epi64(V a, V b) { return unpack<uint64_t>(a, b, 0); }
inline V mm512_unpackhi_epi64(V a, V b) { return unpack<uint64_t>(a, b, 1); }
inline V mm512_inserti32x4(V a, __m128i part, int place) { return insert(a, part, place); }
inline V mm512_inserti64x4(V a, __m256i part, int place) { return insert(a, part, place); }
inline __m256i mm512_extracti64x4_epi64(V a, int place) { return lanes<__m256i>(a)[place]; }
inline V mm512_broadcast_i32x4(__m128i a) { return repeat(a); }
inline V mm512_broadcast_i64x4(__m256i a) { return repeat(a); }
inline V mm512_mask_blend_epi16(Mask k, V a, V b) { return choose<uint16_t>(k, a, b); }
inline V mm512_maskz_expand_epi8(Mask k, V a) { return expand<uint8_t>(V{}, k, a); }
inline V mm512_maskz_expand_epi16(Mask k, V a) { return expand<uint16_t>(V{}, k, a); }
inline V mm512_mask_expand_epi8(V s, Mask k, V a) { return expand<uint8_t>(s, k, a); }
inline V mm512_mask_expand_epi16(V s, Mask k, V a) { return expand<uint16_t>(s, k, a); }
inline V mm512_mask_expand_epi32(V s, Mask k, V a) { return expand<uint32_t>(s, k, a); }
inline __mmask16 mm512_cmp_ps_mask(F a, F b, int predicate) { return compare(a, b, predicate); }
inline __m256i mm512_cvtepi16_epi8(V a) { return convert<uint8_t, __m256i, uint16_t>(a); }
inline __m128i mm512_cvtepi32_epi8(V a) { return convert<uint8_t, __m128i, uint32_t>(a); }
inline __m256i mm512_cvtepi32_epi16(V a) { return convert<uint16_t, __m256i, uint32_t>(a); }
inline __m256i mm512_cvtepi64_epi32(V a) { return convert<uint32_t, __m256i, uint64_t>(a); }
inline __m512 mm512_cvtepi32_ps(V a) { return convert<float, __m512, int32_t>(a); }
inline __m512i mm512_cvtepu8_epi16(__m256i a) { return convert<uint16_t, __m512i, uint8_t>(a); }
inline __m512i mm512_cvtepu8_epi32(__m128i a) { return convert<uint32_t, __m512i, uint8_t>(a); }
inline __m512i mm512_cvtepi8_epi16(__m256i a) { return convert<int16_t, __m512i, int8_t>(a); }
inline __m512i mm512_cvtepi8_epi32(__m128i a) { return convert<int32_t, __m512i, int8_t>(a); }
inline __m512i mm512_cvtepu16_epi32(__m256i a) { return convert<uint32_t, __m512i, uint16_t>(a); }
inline V mm512_cvtps_epi32(F a) {
  const auto x = lanes<float>(a);
  return each<int32_t>([&](int i) { return nearest(x[i]); });
}
inline __m256i mm512_cvtps_ph(F a, int rounding) { return to_half(a, rounding); }
inline F mm512_cvtph_ps(__m256i a) { return from_half(a); }
inline float mm512_cvtss_f32(F a) { return lanes<float>(a)[0]; }
inline __m256i mm512_cvtneps_pbh(F a) { return to_bfloat16s(a); }
inline V mm512_cvtne2ps_pbh(F high, F low) {
  return cast<V>(std::array{to_bfloat16s(low), to_bfloat16s(high)});
}
inline F mm512_dpbf16_ps(F sums, __m512bh a, __m512bh b) {
  return dot_bfloat16(sums, cast<V>(a), cast<V>(b));
}
inline V mm512_dpbusd_epi32(V sums, V a, V b) { return dot_bytes(sums, a, b); }
inline __m256i mm256_dpbusd_avx_epi32(__m256i sums, __m256i a, __m256i b) {
  return dot_bytes(sums, a, b);
}

}  // namespace avx512_emulation

#undef _mm512_load_si512
#define _mm512_load_si512 ::avx512_emulation::mm512_load_si512
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 ::avx512_emulation::mm512_loadu_si512
#undef _mm512_load_ps
#define _mm512_load_ps ::avx512_emulation::mm512_load_ps
#undef _mm512_loadu_ps
#define _mm512_loadu_ps ::avx512_emulation::mm512_loadu_ps
#undef _mm512_store_si512
#define _mm512_store_si512 ::avx512_emulation::mm512_store_si512
#undef _mm512_storeu_si512
#define _mm512_storeu_si512 ::avx512_emulation::mm512_storeu_si512
#undef _mm512_store_ps
#define _mm512_store_ps ::avx512_emulation::mm512_store_ps
#undef _mm512_storeu_ps
#define _mm512_storeu_ps ::avx512_emulation::mm512_storeu_ps
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16 ::avx512_emulation::mm512_maskz_loadu_epi16
#undef _mm512_maskz_loadu_epi8
#define _mm512_maskz_loadu_epi8 ::avx512_emulation::mm512_maskz_loadu_epi8
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps ::avx512_emulation::mm512_maskz_loadu_ps
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 ::avx512_emulation::mm256_maskz_loadu_epi16
#undef _mm256_maskz_loadu_ps
#define _mm256_maskz_loadu_ps ::avx512_emulation::mm256_maskz_loadu_ps
#undef _mm_maskz_loadu_epi16
#define _mm_maskz_loadu_epi16 ::avx512_emulation::mm_maskz_loadu_epi16
#undef _mm512_mask_storeu_epi16
#define _mm512_mask_storeu_epi16 ::avx512_emulation::mm512_mask_storeu_epi16
#undef _mm512_mask_storeu_epi32
#define _mm512_mask_storeu_epi32 ::avx512_emulation::mm512_mask_storeu_epi32
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps ::avx512_emulation::mm512_mask_storeu_ps
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16 ::avx512_emulation::mm256_mask_storeu_epi16
#undef _mm256_mask_storeu_ps
#define _mm256_mask_storeu_ps ::avx512_emulation::mm256_mask_storeu_ps
#undef _mm_mask_storeu_epi16
#define _mm_mask_storeu_epi16 ::avx512_emulation::mm_mask_storeu_epi16
#undef _mm512_setzero_si512
#define _mm512_setzero_si512 ::avx512_emulation::mm512_setzero_si512
#undef _mm512_setzero_ps
#define _mm512_setzero_ps ::avx512_emulation::mm512_setzero_ps
#undef _mm512_set1_epi8
#define _mm512_set1_epi8 ::avx512_emulation::mm512_set1_epi8
#undef _mm512_set1_epi16
#define _mm512_set1_epi16 ::avx512_emulation::mm512_set1_epi16
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 ::avx512_emulation::mm512_set1_epi32
#undef _mm512_set1_epi64
#define _mm512_set1_epi64 ::avx512_emulation::mm512_set1_epi64
#undef _mm512_set1_ps
#define _mm512_set1_ps ::avx512_emulation::mm512_set1_ps
#undef _mm512_set_epi64
#define _mm512_set_epi64 ::avx512_emulation::mm512_set_epi64
#undef _mm512_set4_epi64
#define _mm512_set4_epi64 ::avx512_emulation::mm512_set4_epi64
#undef _mm512_maskz_mov_epi8
#define _mm512_maskz_mov_epi8 ::avx512_emulation::mm512_maskz_mov_epi8
#undef _mm512_maskz_set1_epi8
#define _mm512_maskz_set1_epi8 ::avx512_emulation::mm512_maskz_set1_epi8
#undef _mm512_maskz_set1_epi16
#define _mm512_maskz_set1_epi16 ::avx512_emulation::mm512_maskz_set1_epi16
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps ::avx512_emulation::mm512_castsi512_ps
#undef _mm512_castps_si512
#define _mm512_castps_si512 ::avx512_emulation::mm512_castps_si512
#undef _mm512_castsi256_si512
#define _mm512_castsi256_si512 ::avx512_emulation::mm512_castsi256_si512
#undef _mm512_castsi128_si512
#define _mm512_castsi128_si512 ::avx512_emulation::mm512_castsi128_si512
#undef _mm512_castsi512_si256
#define _mm512_castsi512_si256 ::avx512_emulation::mm512_castsi512_si256
#undef _mm512_castsi512_si128
#define _mm512_castsi512_si128 ::avx512_emulation::mm512_castsi512_si128
#undef _mm512_castps512_ps256
#define _mm512_castps512_ps256 ::avx512_emulation::mm512_castps512_ps256
#undef _mm512_castps256_ps512
#define _mm512_castps256_ps512 ::avx512_emulation::mm512_castps256_ps512
#undef _mm512_zextsi256_si512
#define _mm512_zextsi256_si512 ::avx512_emulation::mm512_zextsi256_si512
#undef _mm512_add_ps
#define _mm512_add_ps ::avx512_emulation::mm512_add_ps
#undef _mm512_sub_ps
#define _mm512_sub_ps ::avx512_emulation::mm512_sub_ps
#undef _mm512_mul_ps
#define _mm512_mul_ps ::avx512_emulation::mm512_mul_ps
#undef _mm512_maskz_sub_ps
#define _mm512_maskz_sub_ps ::avx512_emulation::mm512_maskz_sub_ps
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps ::avx512_emulation::mm512_fmadd_ps
#undef _mm512_add_epi8
#define _mm512_add_epi8 ::avx512_emulation::mm512_add_epi8
#undef _mm512_add_epi16
#define _mm512_add_epi16 ::avx512_emulation::mm512_add_epi16
#undef _mm512_add_epi32
#define _mm512_add_epi32 ::avx512_emulation::mm512_add_epi32
#undef _mm512_sub_epi32
#define _mm512_sub_epi32 ::avx512_emulation::mm512_sub_epi32
#undef _mm512_mullo_epi16
#define _mm512_mullo_epi16 ::avx512_emulation::mm512_mullo_epi16
#undef _mm512_mullo_epi32
#define _mm512_mullo_epi32 ::avx512_emulation::mm512_mullo_epi32
#undef _mm512_mullo_epi64
#define _mm512_mullo_epi64 ::avx512_emulation::mm512_mullo_epi64
#undef _mm512_max_epu16
#define _mm512_max_epu16 ::avx512_emulation::mm512_max_epu16
#undef _mm512_max_epu32
#define _mm512_max_epu32 ::avx512_emulation::mm512_max_epu32
#undef _mm512_and_si512
#define _mm512_and_si512 ::avx512_emulation::mm512_and_si512
#undef _mm512_or_si512
#define _mm512_or_si512 ::avx512_emulation::mm512_or_si512
#undef _mm512_xor_si512
#define _mm512_xor_si512 ::avx512_emulation::mm512_xor_si512
#undef _mm512_maskz_subs_epu8
#define _mm512_maskz_subs_epu8 ::avx512_emulation::mm512_maskz_subs_epu8
#undef _mm512_reduce_max_epu32
#define _mm512_reduce_max_epu32 ::avx512_emulation::mm512_reduce_max_epu32
#undef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps ::avx512_emulation::mm512_reduce_add_ps
#undef _mm512_mask_or_epi32
#define _mm512_mask_or_epi32 ::avx512_emulation::mm512_mask_or_epi32
#undef _mm512_ternarylogic_epi32
#define _mm512_ternarylogic_epi32 ::avx512_emulation::mm512_ternarylogic_epi32
#undef _mm512_ternarylogic_epi64
#define _mm512_ternarylogic_epi64 ::avx512_emulation::mm512_ternarylogic_epi64
#undef _mm512_slli_epi16
#define _mm512_slli_epi16 ::avx512_emulation::mm512_slli_epi16
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 ::avx512_emulation::mm512_slli_epi32
#undef _mm512_slli_epi64
#define _mm512_slli_epi64 ::avx512_emulation::mm512_slli_epi64
#undef _mm512_srli_epi16
#define _mm512_srli_epi16 ::avx512_emulation::mm512_srli_epi16
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 ::avx512_emulation::mm512_srli_epi32
#undef _mm512_srli_epi64
#define _mm512_srli_epi64 ::avx512_emulation::mm512_srli_epi64
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4 ::avx512_emulation::mm512_shuffle_i32x4
#undef _mm512_shuffle_i64x2
#define _mm512_shuffle_i64x2 ::avx512_emulation::mm512_shuffle_i64x2
#undef _mm512_shuffle_epi8
#define _mm512_shuffle_epi8 ::avx512_emulation::mm512_shuffle_epi8
#undef _mm512_maskz_shuffle_epi8
#define _mm512_maskz_shuffle_epi8 ::avx512_emulation::mm512_maskz_shuffle_epi8
#undef _mm256_permutexvar_epi8
#define _mm256_permutexvar_epi8 ::avx512_emulation::mm256_permutexvar_epi8
#undef _mm512_permutexvar_epi8
#define _mm512_permutexvar_epi8 ::avx512_emulation::mm512_permutexvar_epi8
#undef _mm512_permutexvar_epi16
#define _mm512_permutexvar_epi16 ::avx512_emulation::mm512_permutexvar_epi16
#undef _mm512_permutexvar_epi64
#define _mm512_permutexvar_epi64 ::avx512_emulation::mm512_permutexvar_epi64
#undef _mm512_maskz_permutexvar_epi16
#define _mm512_maskz_permutexvar_epi16 ::avx512_emulation::mm512_maskz_permutexvar_epi16
#undef _mm512_permutex2var_epi8
#define _mm512_permutex2var_epi8 ::avx512_emulation::mm512_permutex2var_epi8
#undef _mm512_permutex2var_epi16
#define _mm512_permutex2var_epi16 ::avx512_emulation::mm512_permutex2var_epi16
#undef _mm512_unpacklo_epi8
#define _mm512_unpacklo_epi8 ::avx512_emulation::mm512_unpacklo_epi8
#undef _mm512_unpackhi_epi8
#define _mm512_unpackhi_epi8 ::avx512_emulation::mm512_unpackhi_epi8
#undef _mm512_unpacklo_epi32
#define _mm512_unpacklo_epi32 ::avx512_emulation::mm512_unpacklo_epi32
#undef _mm512_unpackhi_epi32
#define _mm512_unpackhi_epi32 ::avx512_emulation::mm512_unpackhi_epi32
#undef _mm512_unpacklo_epi64
#define _mm512_unpacklo_epi64 ::avx512_emulation::mm512_unpacklo_epi64
#undef _mm512_unpackhi_epi64
#define _mm512_unpackhi_epi64 ::avx512_emulation::mm512_unpackhi_epi64
#undef _mm512_inserti32x4
#define _mm512_inserti32x4 ::avx512_emulation::mm512_inserti32x4
#undef _mm512_inserti64x4
#define _mm512_inserti64x4 ::avx512_emulation::mm512_inserti64x4
#undef _mm512_extracti64x4_epi64
#define _mm512_extracti64x4_epi64 ::avx512_emulation::mm512_extracti64x4_epi64
#undef _mm512_broadcast_i32x4
#define _mm512_broadcast_i32x4 ::avx512_emulation::mm512_broadcast_i32x4
#undef _mm512_broadcast_i64x4
#define _mm512_broadcast_i64x4 ::avx512_emulation::mm512_broadcast_i64x4
#undef _mm512_mask_blend_epi16
#define _mm512_mask_blend_epi16 ::avx512_emulation::mm512_mask_blend_epi16
#undef _mm512_maskz_expand_epi8
#define _mm512_maskz_expand_epi8 ::avx512_emulation::mm512_maskz_expand_epi8
#undef _mm512_maskz_expand_epi16
#define _mm512_maskz_expand_epi16 ::avx512_emulation::mm512_maskz_expand_epi16
#undef _mm512_mask_expand_epi8
#define _mm512_mask_expand_epi8 ::avx512_emulation::mm512_mask_expand_epi8
#undef _mm512_mask_expand_epi16
#define _mm512_mask_expand_epi16 ::avx512_emulation::mm512_mask_expand_epi16
#undef _mm512_mask_expand_epi32
#define _mm512_mask_expand_epi32 ::avx512_emulation::mm512_mask_expand_epi32
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask ::avx512_emulation::mm512_cmp_ps_mask
#undef _mm512_cvtepi16_epi8
#define _mm512_cvtepi16_epi8 ::avx512_emulation::mm512_cvtepi16_epi8
#undef _mm512_cvtepi32_epi8
#define _mm512_cvtepi32_epi8 ::avx512_emulation::mm512_cvtepi32_epi8
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 ::avx512_emulation::mm512_cvtepi32_epi16
#undef _mm512_cvtepi64_epi32
#define _mm512_cvtepi64_epi32 ::avx512_emulation::mm512_cvtepi64_epi32
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps ::avx512_emulation::mm512_cvtepi32_ps
#undef _mm512_cvtepu8_epi16
#define _mm512_cvtepu8_epi16 ::avx512_emulation::mm512_cvtepu8_epi16
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 ::avx512_emulation::mm512_cvtepu8_epi32
#undef _mm512_cvtepi8_epi16
#define _mm512_cvtepi8_epi16 ::avx512_emulation::mm512_cvtepi8_epi16
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32 ::avx512_emulation::mm512_cvtepi8_epi32
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 ::avx512_emulation::mm512_cvtepu16_epi32
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 ::avx512_emulation::mm512_cvtps_epi32
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph ::avx512_emulation::mm512_cvtps_ph
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps ::avx512_emulation::mm512_cvtph_ps
#undef _mm512_cvtss_f32
#define _mm512_cvtss_f32 ::avx512_emulation::mm512_cvtss_f32
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh ::avx512_emulation::mm512_cvtneps_pbh
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh ::avx512_emulation::mm512_cvtne2ps_pbh
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps ::avx512_emulation::mm512_dpbf16_ps
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 ::avx512_emulation::mm512_dpbusd_epi32
#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 ::avx512_emulation::mm256_dpbusd_avx_epi32
