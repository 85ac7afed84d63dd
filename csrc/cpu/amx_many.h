// AMX, any number of tokens: bound by the tile unit and by what surrounds it.
//
// A task is a panel of rows and a span of tokens. It goes through the inputs in chunks: a pair of
// row groups is expanded over one chunk into the L1 cache, and multiplied with every token tile of
// the span, 2 x 2 tiles at a time. The sums of the whole panel stay in the L2 cache between chunks,
// together with the chunk of packed activations that all pairs of the panel use. A B tile from the
// L3 cache would take four times as long as one from L2, so the tile loop itself fetches what comes
// next into L2: weights for the next expansion, and the activations of the next chunk.
//
// A template over the products, a class with the types Block and Tiles (a block, expanded), and
//   kParts        tiles of a block, of the weights and of the activations
//   measure       a phase, before any token is packed
//   pack          64 inputs of up to 16 tokens to kParts B tiles
//   part          an A tile
//   multiply_add
//   write         sums of two row groups and one token tile to y
#pragma once

#include "kernels.h"
#include "scratch.h"
#include "team.h"

// Must follow the headers above.
#include "amx_target.h"

// Must follow amx_target.h.
#include "amx_cut.h"
#include "amx_expand.h"
#include "amx_pack.h"
#include "amx_tile.h"

namespace permllm::cpu {
namespace {

// Cache lines to fetch into L2, some at every step of a loop.
class LineStream {
 public:
  LineStream() = default;
  LineStream(const void* first, int64_t bytes, int64_t steps)
      : next_(static_cast<const char*>(first)),
        end_(next_ + bytes),
        step_(ceil_div(ceil_div(bytes, kLine), steps) * kLine) {}

  void step() {
    const char* until = next_ + step_ < end_ ? next_ + step_ : end_;
    for (; next_ < until; next_ += kLine) prefetch<Tuning::kManyHint>(next_);
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* next_ = nullptr;
  const char* end_ = nullptr;
  int64_t step_ = 0;
};

template <class Products>
class ManyTokens {
 public:
  ManyTokens(const LinearArguments& arguments, const Products& products, const Cut& cut)
      : arguments_(arguments), products_(products), cut_(cut) {}

  void work(Worker& worker) const {
    auto* sums = static_cast<SumTile*>(
        thread_scratch(Scratch::kSums, cut_.panel_groups * cut_.span_tiles * sizeof(SumTile)));
    products_.measure(worker);
    worker.each(cut_.tiles * cut_.chunks,
                [&](int64_t item) { pack(item / cut_.chunks, item % cut_.chunks); });
    worker.begin(cut_.tasks(), cut_.shares);
    int64_t task = worker.claim();
    if (task < 0) return;
    const TileSession session(kTileColumns, kTileColumns);
    for (; task >= 0; task = worker.claim()) multiply(cut_.task(task), sums);
  }

 private:
  using Block = typename Products::Block;
  using Tiles = typename Products::Tiles;
  static constexpr int64_t kChunkBlocks = Tuning::kChunkBlocks;
  static constexpr int64_t kTileBytes = tile_bytes(kTileColumns);
  static constexpr int64_t kBlockSize = Products::kParts * kTileBytes;  // of x

  // What the tile loop fetches: the next pair's weights and the next chunk's activations.
  struct Fetches {
    LineStream weights0, weights1, activations;
    void step() {
      weights0.step();
      weights1.step();
      activations.step();
    }
  };

  char* packed(int64_t chunk, int64_t tile) const {
    return packed_x_ +
           (chunk * kChunkBlocks * cut_.tiles + tile * cut_.chunk_blocks(chunk)) * kBlockSize;
  }
  const Block* weights(int64_t group, int64_t chunk) const {
    return static_cast<const Block*>(arguments_.packed) + group * cut_.blocks +
           chunk * kChunkBlocks;
  }
  int64_t tokens(int64_t tile) const {
    return smaller(arguments_.m - tile * kTileColumns, kTileColumns);
  }

  void pack(int64_t tile, int64_t chunk) const {
    char* target = packed(chunk, tile);
    for (int64_t block = 0; block < cut_.chunk_blocks(chunk); ++block, target += kBlockSize) {
      const int64_t input = (chunk * kChunkBlocks + block) * kBlockInputs;
      products_.pack(tile * kTileColumns, tokens(tile), input, kTileColumns, target);
    }
  }

  void multiply(const Cut::Task& task, SumTile* sums) const {
    const int64_t first_group = task.first_group, end_group = task.end_group;
    if (first_group >= end_group) return;
    const int64_t first_tile = cut_.first_tile(task.span), tiles = cut_.span_size(task.span);
    const int64_t pairs = ceil_div(end_group - first_group, kAmxGroups);
    for (int64_t chunk = 0; chunk < cut_.chunks; ++chunk) {
      const int64_t steps = ceil_div(tiles, 2) * cut_.chunk_blocks(chunk);
      Fetches fetches;
      if (cut_.chunks * cut_.spans > 1) {
        const bool last = chunk + 1 == cut_.chunks;  // the next task starts, with the next span
        const int64_t next = last ? 0 : chunk + 1;
        const int64_t span = last ? (task.span + 1) % cut_.spans : task.span;
        fetches.activations =
            LineStream(packed(next, cut_.first_tile(span)),
                       cut_.span_size(span) * cut_.chunk_blocks(next) * kBlockSize, steps * pairs);
      }
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const int64_t group = first_group + pair * kAmxGroups;
        const int64_t second = group + 1 < end_group ? group + 1 : group;
        fetch_weights_after(pair, chunk, first_group, end_group, steps, fetches);
        multiply_pair(group, second, chunk, first_tile, tiles, sums + pair * cut_.span_tiles * 2,
                      fetches);
      }
    }
  }

  void fetch_weights_after(int64_t pair, int64_t chunk, int64_t first_group, int64_t end_group,
                           int64_t steps, Fetches& fetches) const {
    int64_t group = first_group + (pair + 1) * kAmxGroups;
    if (group >= end_group) {
      group = first_group;
      chunk += 1;
    }
    fetches.weights0 = fetches.weights1 = LineStream();
    if (chunk == cut_.chunks) return;
    const int64_t bytes = cut_.chunk_blocks(chunk) * sizeof(Block);
    fetches.weights0 = LineStream(weights(group, chunk), bytes, steps);
    if (group + 1 < end_group) {
      fetches.weights1 = LineStream(weights(group + 1, chunk), bytes, steps);
    }
  }

  void multiply_pair(int64_t group, int64_t second, int64_t chunk, int64_t first_tile,
                     int64_t tiles, SumTile* sums, Fetches& shared_fetches) const {
    const int64_t blocks = cut_.chunk_blocks(chunk);
    const Block* source0 = weights(group, chunk);
    const Block* source1 = weights(second, chunk);
    Tiles weights0[kChunkBlocks], weights1[kChunkBlocks];
    for (int64_t block = 0; block < blocks; ++block) {
      expand(source0[block], weights0[block]);
      expand(source1[block], weights1[block]);
    }
    Fetches fetches = shared_fetches;
    const char* x = packed(chunk, first_tile);
    const int64_t x_step = blocks * kBlockSize;
    for (int64_t tile = 0; tile < tiles; tile += 2, x += 2 * x_step, sums += 4) {
      const bool two = tile + 1 < tiles;
      if (two) {
        multiply_tiles<2>(weights0, weights1, x, x + x_step, blocks, chunk == 0, sums, fetches);
      } else {
        multiply_tiles<1>(weights0, weights1, x, x, blocks, chunk == 0, sums, fetches);
      }
      if (chunk + 1 < cut_.chunks) continue;
      for (int64_t t = 0; t <= (two ? 1 : 0); ++t) {
        const int64_t token_tile = first_tile + tile + t;
        products_.write(sums[2 * t], sums[2 * t + 1], group * kAmxRows, token_tile * kTileColumns);
      }
    }
    shared_fetches = fetches;
  }

  // `sums` are [token tile][row group].
  template <int TokenTiles>
  static inline void multiply_tiles(const Tiles* weights0, const Tiles* weights1, const char* x0,
                                    const char* x1, int64_t blocks, bool first, SumTile* sums,
                                    Fetches& fetches) {
    if (first) {
      zero_sums();
    } else {
      tile::load<kSum00>(sums[0].rows, kTileRowBytes);
      tile::load<kSum10>(sums[1].rows, kTileRowBytes);
      if constexpr (TokenTiles == 2) {
        tile::load<kSum01>(sums[2].rows, kTileRowBytes);
        tile::load<kSum11>(sums[3].rows, kTileRowBytes);
      }
    }
    for (int64_t block = 0; block < blocks; ++block) {
#pragma GCC unroll 2
      for (int part = 0; part < Products::kParts; ++part) {
        tile::load<kWeights0>(Products::part(weights0[block], part), kTileRowBytes);
        tile::load<kTokens0>(x0, kTileRowBytes);
        Products::template multiply_add<kSum00, kWeights0, kTokens0>();
        if constexpr (TokenTiles == 2) {
          tile::load<kTokens1>(x1, kTileRowBytes);
          Products::template multiply_add<kSum01, kWeights0, kTokens1>();
        }
        tile::load<kWeights1>(Products::part(weights1[block], part), kTileRowBytes);
        Products::template multiply_add<kSum10, kWeights1, kTokens0>();
        if constexpr (TokenTiles == 2) {
          Products::template multiply_add<kSum11, kWeights1, kTokens1>();
        }
        x0 += kTileBytes;
        x1 += kTileBytes;
      }
      fetches.step();
    }
    tile::store<kSum00>(sums[0].rows, kTileRowBytes);
    tile::store<kSum10>(sums[1].rows, kTileRowBytes);
    if constexpr (TokenTiles == 2) {
      tile::store<kSum01>(sums[2].rows, kTileRowBytes);
      tile::store<kSum11>(sums[3].rows, kTileRowBytes);
    }
  }

  const LinearArguments& arguments_;
  const Products& products_;
  const Cut cut_;
  char* const packed_x_ =
      static_cast<char*>(arguments_.packed_x);  // [chunk][token tile][block][B tile]
};

template <class Products>
void multiply_many_tokens(const LinearArguments& a, Worker& worker) {
  const int64_t tiles = ceil_div(a.m, kTileColumns);
  const int64_t parts = ceil_div(tiles, Tuning::kPackedTokens / kTileColumns);
  const int64_t tokens = ceil_div(tiles, parts) * kTileColumns;
  for (int64_t first = 0; first < a.m; first += tokens) {
    const LinearArguments part = part_of(a, first, smaller(tokens, a.m - first));
    const Products products(part);
    ManyTokens<Products>(part, products, Cut(part, worker.count())).work(worker);
  }
}

}  // namespace
}  // namespace permllm::cpu
