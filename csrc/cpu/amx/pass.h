// One pass of AMX for many tokens: the expanded weights of two row groups and a chunk of inputs
// times one or two token tiles. Include after amx/target.h.
//
// Meanwhile it fetches what comes later, and the last pass with a chunk replaces each block by one
// of the next chunk, as soon as nothing needs it: the tile unit multiplies while the vector unit
// expands, and the stores find their lines in the L1 cache.
//
// A template over the products, as amx/many.h says.
#pragma once

#include "cpu/amx/expand.h"
#include "cpu/amx/pack.h"
#include "cpu/amx/tile.h"

namespace permllm::cpu {
namespace {

// Cache lines to fetch into L2, some at every step of a loop.
class LineStream {
 public:
  static constexpr int64_t kLine = 64;

  LineStream() = default;
  LineStream(const void* first, int64_t lines, int64_t steps, int64_t stride = kLine)
      : next_(static_cast<const char*>(first)),
        stride_(stride),
        left_(lines),
        at_once_(ceil_div(lines, steps)) {}

  void step() {
    const int64_t count = smaller(at_once_, left_);
    left_ -= count;
    for (int64_t line = 0; line < count; ++line, next_ += stride_) {
      prefetch<Tuning::kManyHint>(next_);
    }
  }

 private:
  const char* next_ = nullptr;
  int64_t stride_ = 0;
  int64_t left_ = 0, at_once_ = 0;
};

// The sums of the next pass, on their way into L1: loaded from L2, they would keep the tile unit
// waiting. Some lines follow every product.
class SumStream {
 public:
  SumStream() = default;
  SumStream(const SumTile* first, int64_t tiles)
      : next_(reinterpret_cast<const char*>(first)), left_(tiles * kTileLines) {}

  void fetch(int product) const {
    if (left_ <= 0) return;
    const char* line = next_ + product * kLinesAtOnce * LineStream::kLine;
#pragma GCC unroll 2
    for (int i = 0; i < kLinesAtOnce; ++i) prefetch<kIntoL1>(line + i * LineStream::kLine);
  }

  // Behind so many products.
  void step(int products) {
    left_ -= products * kLinesAtOnce;
    next_ += products * kLinesAtOnce * LineStream::kLine;
  }

 private:
  static constexpr int kLinesAtOnce = 2;
  static constexpr int64_t kTileLines = sizeof(SumTile) / LineStream::kLine;

  const char* next_ = nullptr;
  int64_t left_ = 0;
};

// What passes fetch: the weights that come after those which are being expanded, the activations of
// the next chunk, the lines of y where a pass completes sums, and the sums of the next pass.
struct Fetches {
  LineStream weights[kAmxGroups], activations, outputs;
  SumStream sums;

  void step() {
    for (LineStream& stream : weights) stream.step();
    activations.step();
    outputs.step();
  }
};

template <class Products>
class Pass {
 public:
  using Block = typename Products::Block;
  using Tiles = typename Products::Tiles;
  using Tables = GroupTables<typename Products::Value>;
  static constexpr int64_t kTileBytes = tile_bytes(kTileColumns);
  static constexpr int64_t kBlockBytes = Products::kParts * kTileBytes;  // of one token tile

  template <int TokenTiles>
  static constexpr int kProducts = Products::kParts * kAmxGroups * TokenTiles;  // of a block

  // A block of both row groups, expanded.
  struct Weights {
    Tiles groups[kAmxGroups];
  };

  // Consecutive blocks of both row groups; where only one is left, it is both.
  struct Source {
    const Block* groups[kAmxGroups];
    int64_t blocks = 0;
    int64_t first_block = 0;
    Tables* tables = nullptr;  // of both
  };

  static void expand_block(const Source& source, int64_t block, Weights& weights) {
    for (int group = 0; group < kAmxGroups; ++group) {
      expand(source.groups[group][block], source.first_block + block, source.tables[group],
             weights.groups[group]);
    }
  }

  // Adds to the sums in the tile registers the products of `blocks` blocks with token tiles, which
  // lie one after the other at `x`.
  template <int TokenTiles>
  static void multiply(const Weights* weights, const char* x, int64_t blocks, Fetches& fetches) {
    Fetches local = fetches;  // in registers
    const char* x1 = x + blocks * kBlockBytes;
    for (int64_t block = 0; block < blocks; ++block) {
      multiply_block<TokenTiles>(weights[block], x, x1,
                                 [&](int product) { local.sums.fetch(product); });
      x += kBlockBytes;
      x1 += kBlockBytes;
      local.step();
      local.sums.step(kProducts<TokenTiles>);
    }
    fetches = local;
  }

  // The same, and replaces the weights.
  template <int TokenTiles>
  static void multiply(Weights* weights, const char* x, int64_t blocks, const Source& next,
                       Fetches& fetches) {
    constexpr int kRows = kAmxGroups * kAmxRows / kProducts<TokenTiles>;
    Fetches local = fetches;
    const char* x1 = x + blocks * kBlockBytes;
    int64_t replaced = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      if (block > 0 && replaced < next.blocks) {
        const Block& source0 = next.groups[0][replaced];
        const Block& source1 = next.groups[1][replaced];
        Weights& target = weights[replaced];
        multiply_block<TokenTiles>(weights[block], x, x1, [&](int product) {
#pragma GCC unroll 16
          for (int r = product * kRows; r < product * kRows + kRows; ++r) {
            const bool second = r >= kAmxRows;
            expand_row(second ? source1 : source0, next.tables[second], r % kAmxRows,
                       target.groups[second]);
          }
          local.sums.fetch(product);
        });
        for (int group = 0; group < kAmxGroups; ++group) {
          next.tables[group].place_strays(next.first_block + replaced, target.groups[group]);
        }
        ++replaced;
      } else {
        multiply_block<TokenTiles>(weights[block], x, x1,
                                   [&](int product) { local.sums.fetch(product); });
      }
      x += kBlockBytes;
      x1 += kBlockBytes;
      local.step();
      local.sums.step(kProducts<TokenTiles>);
    }
    for (; replaced < next.blocks; ++replaced) expand_block(next, replaced, weights[replaced]);
    fetches = local;
  }

 private:
  // `meanwhile(i)` follows the i-th of the products. No other pass soon needs the activations.
  template <int TokenTiles, class Meanwhile>
  [[gnu::always_inline]] static inline void multiply_block(const Weights& weights, const char* x0,
                                                           const char* x1, Meanwhile meanwhile) {
#pragma GCC unroll 2
    for (int part = 0; part < Products::kParts; ++part) {
      const int product = part * kAmxGroups * TokenTiles;
      tile::load<kWeights0>(Products::part(weights.groups[0], part), kTileRowBytes);
      tile::load_once<kTokens0>(x0, kTileRowBytes);
      Products::template multiply_add<kSum00, kWeights0, kTokens0>();
      meanwhile(product);
      if constexpr (TokenTiles == 2) {
        tile::load_once<kTokens1>(x1, kTileRowBytes);
        Products::template multiply_add<kSum01, kWeights0, kTokens1>();
        meanwhile(product + 1);
      }
      tile::load<kWeights1>(Products::part(weights.groups[1], part), kTileRowBytes);
      Products::template multiply_add<kSum10, kWeights1, kTokens0>();
      meanwhile(product + TokenTiles);
      if constexpr (TokenTiles == 2) {
        Products::template multiply_add<kSum11, kWeights1, kTokens1>();
        meanwhile(product + 3);
      }
      x0 += kTileBytes;
      x1 += kTileBytes;
    }
  }
};

}  // namespace
}  // namespace permllm::cpu
