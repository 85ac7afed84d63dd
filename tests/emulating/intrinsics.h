// The intrinsics of AVX-512 and AVX-VNNI that csrc/cpu uses, under their own names but for the
// first underscore, and with their arguments.
//
// What they leave undefined is filled with bytes that no test can miss. Loads and stores that must
// be aligned check it.
#pragma once

#include "lanes.h"

namespace avx512_emulation {

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
inline V mm512_sub_epi8(V a, V b) {
  return map<uint8_t>(a, b, [](uint8_t x, uint8_t y) { return x - y; });
}
inline V mm512_sub_epi16(V a, V b) {
  return map<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return x - y; });
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
inline V mm512_srai_epi32(V a, unsigned n) {
  return map<int32_t>(a, [=](int32_t x) { return x >> (n < 32 ? n : 31); });
}
inline V mm512_popcnt_epi16(V a) {
  return map<uint16_t>(a, [](uint16_t x) { return __builtin_popcount(x); });
}
inline V mm512_packus_epi16(V a, V b) {
  const auto x = lanes<int16_t>(a), y = lanes<int16_t>(b);
  return each<uint8_t>([&](int i) {
    const int word = i / 16 * 8 + i % 8;
    return std::clamp<int>(i % 16 < 8 ? x[word] : y[word], 0, 255);
  });
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
inline V mm512_dpwssd_epi32(V sums, V a, V b) { return dot_words(sums, a, b); }
inline __m256i mm256_dpbusd_avx_epi32(__m256i sums, __m256i a, __m256i b) {
  return dot_bytes(sums, a, b);
}

}  // namespace avx512_emulation
