// Activations as integers for the AMX kernels of int8 values. Include after amx/pack.h.
//
// One scale per token (token_scale.h). The tile unit multiplies signed weights with signed or
// unsigned bytes, so nothing is shifted.
#pragma once

#include <immintrin.h>

#include "cpu/amx/expand.h"
#include "cpu/amx/pack.h"
#include "cpu/kernels.h"
#include "cpu/token_scale.h"
#include "cpu/words.h"

namespace permllm::cpu {
namespace {

// 64 integers as bytes, in order: bits first..first+7 of each.
inline __m512i to_bytes(const __m512i (&integers)[4], int first) {
  __m512i bytes = _mm512_setzero_si512();
  bytes = _mm512_inserti32x4(bytes, _mm512_cvtepi32_epi8(_mm512_srli_epi32(integers[0], first)), 0);
  bytes = _mm512_inserti32x4(bytes, _mm512_cvtepi32_epi8(_mm512_srli_epi32(integers[1], first)), 1);
  bytes = _mm512_inserti32x4(bytes, _mm512_cvtepi32_epi8(_mm512_srli_epi32(integers[2], first)), 2);
  return _mm512_inserti32x4(bytes, _mm512_cvtepi32_epi8(_mm512_srli_epi32(integers[3], first)), 3);
}

// The scales of all tokens of a call, each measured before it is quantized. Largest is 127
// for 8 bits, 32767 for 16.
template <int Largest>
class QuantizedTokens {
 public:
  explicit QuantizedTokens(const LinearArguments& a)
      : a_(a), scales_(a.token_scales), inverses_(scales_ + size()) {}

  // A phase: finds the scales of all tokens.
  void measure(Worker& worker) const {
    if (a_.m * a_.k <= Tuning::kPreparedAlone) {
      worker.alone([&] {
        for (int64_t token = 0; token < size(); ++token) measure(token);
      });
    } else {
      worker.each(size(), [&](int64_t token) { measure(token); });
    }
  }

  // 64 inputs of a token from `input` on as 32-bit integers, 16 to a vector; zeros past k. What
  // they are for a NaN or an infinity, whose scale is no number either, does not matter.
  void quantize(int64_t token, int64_t input, __m512i (&integers)[4]) const {
    const bf16* x = a_.x + token * a_.x_stride + input;
    const __m512 inverse = _mm512_set1_ps(inverses_[token]);
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const auto valid = static_cast<__mmask16>(first_lanes(a_.k - input - part * 16));
      const __m512 values = widen(_mm256_maskz_loadu_epi16(valid, x + part * 16), a_.half);
      integers[part] = _mm512_cvtps_epi32(_mm512_mul_ps(values, inverse));
    }
  }

  // 64 inputs of up to 16 tokens, as integers of 8 bits, to a B tile.
  void pack_bytes(int64_t token, int64_t tokens, int64_t input, int columns, char* tile) const {
    static_assert(Largest <= 127);
    __m512i bytes[16];
    for (int64_t t = 0; t < 16; ++t) {
      bytes[t] = _mm512_setzero_si512();
      if (t >= tokens) continue;
      __m512i integers[4];
      quantize(token + t, input, integers);
      bytes[t] = to_bytes(integers, 0);
    }
    store_tile(bytes, columns, tile);
  }

  // Two C tiles of int32 sums, of `row` and 16 rows further on. `convert(tile, r)` gives a row of
  // them as float32.
  template <class Convert>
  void write(const OutputColumns& out, int64_t row, int64_t token, Convert convert) const {
    SumTile sums[2];
    const __m512 scales = _mm512_loadu_ps(scales_ + token);
    for (int tile = 0; tile < 2; ++tile) {
      for (int r = 0; r < kAmxRows; ++r) {
        const int64_t output = row + tile * kAmxRows + r;
        const __m512 scale = _mm512_set1_ps(output < a_.n ? a_.scale[output] : 0.0f);
        _mm512_store_ps(sums[tile].rows[r],
                        _mm512_mul_ps(_mm512_mul_ps(convert(tile, r), scale), scales));
      }
    }
    store_outputs(sums[0], sums[1], token, smaller(a_.m - token, kTileColumns), out);
  }

 private:
  // Those that fill the last tile have no scale.
  void measure(int64_t token) const {
    if (token >= a_.m) {
      scales_[token] = 0.0f;
      return;
    }
    const TokenScale own(largest_magnitude(a_, token), Largest);
    scales_[token] = own.scale;
    inverses_[token] = own.inverse;
  }

  int64_t size() const { return ceil_div(a_.m, kTileColumns) * kTileColumns; }

  const LinearArguments& a_;
  float* const scales_;
  float* const inverses_;
};

// A row of int32 sums as float32.
inline __m512 to_float(const float (&sums)[kTileColumns]) {
  return _mm512_cvtepi32_ps(_mm512_load_si512(sums));
}

}  // namespace
}  // namespace permllm::cpu
