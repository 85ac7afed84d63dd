// Many tokens in float32, with vectors of any width: only the values that are kept are multiplied.
//
// A lane is a token, so that an input is a vector of x for every kLanes tokens, and a kept value
// picks its input's: half of the products of a dense layer. Its value is broadcast once for as many
// vectors as registers hold sums of. What this costs is loads: each product has one of its own.
//
// An input that is not finite reaches the rows that keep it, where kernels that expand rows
// multiply it by zeros too.
//
// Rows are decoded once for all tokens, to the values and to where x of their inputs lies.
#pragma once

#include "cpu/memory/scratch.h"
#include "cpu/threads/phases.h"
#include "cpu/token_blocks.h"
#include "cpu/vector/float32.h"

// The vector code comes last.
#include "cpu/vector/output_rows.h"
#include "cpu/vector/row_groups.h"

namespace permllm::cpu {
namespace {

// For every mask of eight inputs, those that it keeps, in units of `Unit`.
template <class Place, int Unit>
struct KeptPlaces {
  constexpr KeptPlaces() {
    for (int mask = 0; mask < 256; ++mask) {
      int count = 0;
      for (int input = 0; input < 8; ++input) {
        if ((mask >> input & 1) != 0) of[mask][count++] = static_cast<Place>(input * Unit);
      }
    }
  }

  alignas(8 * sizeof(Place)) Place of[256][8] = {};
};

template <class Place, int Unit>
constexpr KeptPlaces<Place, Unit> kKeptPlaces;

// Those of the inputs of a row's values, with room for what is written past the last.
template <class Place>
using RowPlaces = Place[kBlockValues + 8];

template <class Place, int Unit>
inline void find_places(uint64_t mask, RowPlaces<Place>& places) {
  typedef Place Eight __attribute__((vector_size(8 * sizeof(Place)), aligned(1), may_alias));
  typedef Place Four __attribute__((vector_size(4 * sizeof(Place)), aligned(1), may_alias));
  uint64_t counts = kept_of_eights(mask);
  if (counts == kFourOfEights) [[likely]] {
    PERMLLM_UNROLL
    for (int i = 0; i < kBlockInputs / 8; ++i) {
      const auto* eight = kKeptPlaces<Place, Unit>.of[mask >> 8 * i & 0xff];
      *reinterpret_cast<Four*>(places + 4 * i) =
          *reinterpret_cast<const Four*>(eight) + static_cast<Place>(8 * i * Unit);
    }
    return;
  }
  counts *= 0x0101010101010101;  // byte i has those of bytes up to i
  constexpr uint64_t kSound = 0x0f0f0f0f0f0f0f0f;
  if (counts >> 56 != kBlockValues) return find_places<Place, Unit>(kSound, places);  // damaged
  PERMLLM_UNROLL
  for (int i = 0; i < kBlockInputs / 8; ++i) {
    const uint64_t first = i == 0 ? 0 : counts >> 8 * (i - 1) & 0xff;
    const auto* eight = kKeptPlaces<Place, Unit>.of[mask >> 8 * i & 0xff];
    *reinterpret_cast<Eight*>(places + first) =
        *reinterpret_cast<const Eight*>(eight) + static_cast<Place>(8 * i * Unit);
  }
}

// Blocks with masks.
template <class Isa, class Value>
struct KeptMasks {
  using Weights = PackedBlocks<Value>;
  using Vector = typename Isa::Vector;
  using Tuning = typename Isa::Tuning;
  static constexpr int kLanes = Isa::kLanes;
  static constexpr float kUnit = 1.0f;

  struct Row {
    alignas(64) float values[kBlockValues];
    alignas(64) RowPlaces<uint32_t> places;
  };

  struct Decoded {
    float value(int row, int i) const { return rows[row].values[i]; }
    uint32_t place(int row, int i) const { return rows[row].places[i]; }

    Row rows[kRows];
  };

  static void decode(Weights place, Decoded& decoded) {
    for (int r = 0; r < kRows; ++r) decode(*place, r, decoded.rows[r]);
  }

 private:
  static void decode(const typename Weights::Block& block, int row, Row& decoded) {
    find_places<uint32_t, sizeof(Vector)>(block.mask[row], decoded.places);
    for (int i = 0; i < kBlockValues; ++i) decoded.values[i] = to_float(block.values[row][i]);
  }
};

// `Source` says where the values come from:
//   Weights             where its blocks are (row_groups.h)
//   Vector, kLanes      of floats
//   Tuning              the table of constants
//   decode(place, out)  to Decoded, which has of a row's i-th value, ascending by input,
//     value(row, i)     itself, in units of kUnit
//     place(row, i)     bytes from x of the block's first input, were x a vector for each
template <class Source, class Real>
class KeptTokens {
  using Tuning = typename Source::Tuning;
  using Vector = typename Source::Vector;
  using Decoded = typename Source::Decoded;
  using Weights = typename Source::Weights;

  static constexpr int kLanes = Source::kLanes;
  static constexpr int kVectors = Tuning::kKeptVectors;
  static constexpr int64_t kPanelGroups = Tuning::kKeptPanelGroups;

  // So many rows take turns that sums need not wait for their own last product.
  static constexpr int rows_at_once(int vectors) {
    int rows = 1;
    while (rows < kRows && 2 * rows * vectors <= kVectors) rows *= 2;
    return rows;
  }

 public:
  static constexpr int64_t kPreparedAlone = Tuning::kPreparedAlone;
  static constexpr int64_t kPackedTokens = Tuning::kPackedTokens;

  explicit KeptTokens(const LinearOf<Real>& a)
      : a_(a),
        blocks_(ceil_div(a.k, kBlockInputs)),
        vectors_(ceil_div(a.m, kLanes)),
        x_(static_cast<float*>(a.packed_x)),
        inputs_(a) {}

  int64_t elements() const { return a_.m * a_.k; }
  static int64_t measures() { return 0; }
  static void measure(int64_t) {}
  int64_t packs() const { return blocks_; }
  int64_t groups() const { return ceil_div(a_.n, kRows); }

  // x as [input block][up to kVectors vectors of tokens][input][vector][kLanes], zeros where there
  // is no token.
  void pack(int64_t block) const {
    for_each_block<kVectors>(vectors_, [&](int64_t vector, auto count) {
      constexpr int64_t kTokens = count * kLanes;
      float* target = packed(block, vector);
      const int64_t first = vector * kLanes;
      const int64_t tokens = smaller(kTokens, a_.m - first);
      if (tokens < kTokens) __builtin_memset(target, 0, kBlockInputs * kTokens * sizeof(float));
      for (int64_t t = 0; t < tokens; ++t) {
        alignas(64) float inputs[kBlockInputs];
        inputs_.load(first + t, block, inputs);
        for (int i = 0; i < kBlockInputs; ++i) target[i * kTokens + t] = inputs[i];
      }
    });
  }

  // Row groups begin..end-1, kPanelGroups at a time: all inputs, then out.
  void run(int64_t begin, int64_t end) const {
    const int64_t stride = (vectors_ + 1) * kLanes;  // no power of two: rows share no cache set
    const int64_t sums_bytes = kPanelGroups * kRows * stride * sizeof(float);
    auto* sums = static_cast<float*>(thread_scratch(Scratch::kSums, sums_bytes));
    auto* panel =
        static_cast<Decoded*>(thread_scratch(Scratch::kPanel, kPanelGroups * sizeof(Decoded)));
    for (int64_t start = begin; start < end; start += kPanelGroups) {
      const int64_t groups = smaller(kPanelGroups, end - start);
      __builtin_memset(sums, 0, sums_bytes);
      for (int64_t block = 0; block < blocks_; ++block) {
        const bool last = block + 1 == blocks_;
        for (int64_t g = 0; g < groups; ++g) {
          const Weights next(a_, last ? start + groups + g : start + g, last ? 0 : block + 1);
          next.template prefetch<Tuning::kManyHint>();
          Source::decode(Weights(a_, start + g, block), panel[g]);
        }
        for_each_block<kVectors>(vectors_, [&](int64_t vector, auto count) {
          const auto* x = reinterpret_cast<const char*>(packed(block, vector));
          float* target = sums + vector * kLanes;
          for (int64_t g = 0; g < groups; ++g, target += kRows * stride) {
            multiply<count>(panel[g], x, target, stride);
          }
        });
      }
      write_groups<kLanes, kPanelGroups>(a_, start, groups, sums, stride, [&](int64_t group) {
        return Float32Outputs<Real>(a_, group, Source::kUnit);
      });
    }
  }

 private:
  float* packed(int64_t block, int64_t vector) const {
    return x_ + (block * vectors_ + vector) * kBlockInputs * kLanes;
  }

  // sums[row][token] (rows `stride` apart) += value * x[place of its input][token], for one block.
  template <int Vectors>
  static void multiply(const Decoded& decoded, const char* x, float* sums, int64_t stride) {
    constexpr int kRowsAtOnce = rows_at_once(Vectors);
    for (int first = 0; first < kRows; first += kRowsAtOnce) {
      float* target = sums + first * stride;
      Vector sum[kRowsAtOnce][Vectors];
      load_sums(target, stride, sum);
      for (int i = 0; i < kBlockValues; ++i) {
        PERMLLM_UNROLL
        for (int r = 0; r < kRowsAtOnce; ++r) {
          const auto* tokens =
              reinterpret_cast<const Vector*>(x + int64_t{decoded.place(first + r, i)} * Vectors);
          const float value = decoded.value(first + r, i);
          PERMLLM_UNROLL
          for (int v = 0; v < Vectors; ++v) sum[r][v] += value * tokens[v];
        }
      }
      store_sums(target, stride, sum);
    }
  }

  const LinearOf<Real>& a_;
  const int64_t blocks_;
  const int64_t vectors_;
  float* const x_;
  const Float32Inputs<Real> inputs_;
};

}  // namespace
}  // namespace permllm::cpu
