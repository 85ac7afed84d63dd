// The lanes of vectors in plain loops: what the intrinsics of intrinsics.h are made of.
//
// After Intel's instruction set reference. Subnormal bfloat16 and float32 numbers are zero in
// products, as the hardware takes them.
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

inline __m512i dot_words(__m512i sums, __m512i first, __m512i second) {
  const auto s = lanes<uint32_t>(sums);
  const auto a = lanes<int16_t>(first), b = lanes<int16_t>(second);
  return each<uint32_t>([&](int i) {
    return s[i] + static_cast<uint32_t>(a[2 * i] * b[2 * i]) +
           static_cast<uint32_t>(a[2 * i + 1] * b[2 * i + 1]);
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

}  // namespace avx512_emulation
