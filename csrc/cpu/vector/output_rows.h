// The outputs of a row group, with vectors of any width.
//
// Include after every other header: what follows is compiled for one instruction set.
#pragma once

#include <optional>

#include "cpu/vector/vector.h"

namespace permllm::cpu {
namespace {

// Where the outputs of one row group go.
template <class Real>
struct OutputRows {
  OutputRows(const LinearOf<Real>& a, int64_t group)
      : row(group * kRows),
        rows(static_cast<int>(smaller(kRows, a.n - row))),
        y(a.y + row),
        stride(a.n) {
    for (int r = 0; r < rows; ++r) {
      if (a.bias != nullptr) bias[r] = to_float(a.bias[row + r]);
    }
  }

  Real& at(int64_t token, int r) const { return y[token * stride + r]; }

  int64_t row;
  int rows;
  Real* y;
  int64_t stride;
  float bias[kRows] = {};
};

// Lanes tokens of one row group to target[token][row], tokens `width` rows apart: sums[row][token],
// rows `stride` lanes apart, of tokens from `first` on. Four rows of 16 bits become a word of their
// token, which is stored as it is.
template <int Lanes, class Outputs, class Lane, class Real>
inline void round_group(const Outputs& out, const Lane* sums, int64_t stride, int64_t first,
                        Real* target, int64_t width) {
  const auto rounded = [&](int r, int t) {
    Real y;
    round_to(y, out.value(first + t, r, sums + r * stride + t));
    return y;
  };
  if constexpr (sizeof(Real) == 2) {
    static_assert(kRows % 4 == 0);
    const auto bits = [&](int r, int t) {
      uint16_t y;
      const Real value = rounded(r, t);
      __builtin_memcpy(&y, &value, sizeof(y));
      return uint32_t{y};
    };
    for (int r = 0; r < kRows; r += 4) {
      alignas(64) uint64_t words[Lanes];
      for (int t = 0; t < Lanes; ++t) {
        const uint32_t low = bits(r, t) | bits(r + 1, t) << 16;
        const uint32_t high = bits(r + 2, t) | bits(r + 3, t) << 16;
        words[t] = low | uint64_t{high} << 32;
      }
      PERMLLM_UNROLL
      for (int t = 0; t < Lanes; ++t) {
        __builtin_memcpy(target + t * width + r, &words[t], sizeof(words[t]));
      }
    }
  } else {
    for (int r = 0; r < kRows; ++r) {
      alignas(64) Real tokens[Lanes];
      for (int t = 0; t < Lanes; ++t) tokens[t] = rounded(r, t);
      PERMLLM_UNROLL
      for (int t = 0; t < Lanes; ++t) target[t * width + r] = tokens[t];
    }
  }
}

// The outputs of `groups` row groups from `start` on, at most Groups: sums[row][token], rows
// `stride` lanes apart. Neighbouring outputs of a token are written together.
//
// outputs_of(group) are OutputRows with value(token, row, sum), a float. It is asked, for nothing,
// of rows past the last and of tokens up to a multiple of Lanes too, whose sums can be read.
template <int Lanes, int64_t Groups, class Real, class Lane, class OutputsOf>
inline void write_groups(const LinearOf<Real>& a, int64_t start, int64_t groups, const Lane* sums,
                         int64_t stride, OutputsOf outputs_of) {
  constexpr int64_t kTileTokens = Float32Tuning::kWrittenTokens, kWidth = Groups * kRows;
  static_assert(kTileTokens % Lanes == 0);
  std::optional<decltype(outputs_of(start))> out[Groups];
  for (int64_t g = 0; g < groups; ++g) out[g].emplace(outputs_of(start + g));
  alignas(64) Real tile[kTileTokens][kWidth];
  const int64_t row = start * kRows, rows = smaller(groups * kRows, a.n - row);
  for (int64_t first = 0; first < a.m; first += kTileTokens) {
    const int64_t tokens = smaller(kTileTokens, a.m - first);
    for (int64_t g = 0; g < groups; ++g) {
      const Lane* group = sums + g * kRows * stride + first;
      for (int64_t t = 0; t < tokens; t += Lanes) {
        round_group<Lanes>(*out[g], group + t, stride, first + t, tile[t] + g * kRows, kWidth);
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      Real* y = a.y + (first + t) * a.n + row;
      if (rows == kWidth) {
        __builtin_memcpy(y, tile[t], sizeof(tile[t]));  // of a size that the compiler knows
      } else {
        __builtin_memcpy(y, tile[t], rows * sizeof(Real));
      }
    }
  }
}

}  // namespace
}  // namespace permllm::cpu
