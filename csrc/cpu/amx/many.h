// AMX, any number of tokens: bound by the tile unit and by what surrounds it.
//
// A task is a panel of rows and a span of tokens. It goes through the inputs in chunks: a pair of
// row groups is expanded over one chunk into the L1 cache, and multiplied with every token tile of
// the span, 2 x 2 tiles at a time (amx/pass.h). The sums of the whole panel stay in the L2 cache
// between chunks, together with the chunk of packed activations that all pairs of the panel use. A
// B tile from the L3 cache would take four times as long as one from L2, so the passes fetch what
// comes next into L2.
//
// Lines that go through the L1 cache once would drive the expanded weights out of it: B tiles are
// loaded past it. So a chunk can be long, and sums, whose way to L2 and back takes as long as four
// products of each tile, are loaded and stored less often. Every pass fetches those of the next one
// into L1: a tile that is loaded from L2 between the last and the first product delays both.
//
// A template over the products, a class with the types Block and Tiles (a block, expanded), and
//   kParts        tiles of a block, of the weights and of the activations
//   measure       a phase, before any token is packed
//   pack          64 inputs of up to 16 tokens to kParts B tiles
//   part          an A tile
//   multiply_add
//   write         sums of two row groups and one token tile to y
#pragma once

#include "cpu/kernels.h"
#include "cpu/memory/scratch.h"
#include "cpu/threads/team.h"

// Must follow the headers above.
#include "cpu/amx/target.h"

// Must follow amx/target.h.
#include "cpu/amx/cut.h"
#include "cpu/amx/expand.h"
#include "cpu/amx/pack.h"
#include "cpu/amx/pass.h"
#include "cpu/amx/tile.h"

namespace permllm::cpu {
namespace {

template <class Products>
class ManyTokens {
 public:
  ManyTokens(const LinearArguments& arguments, const Products& products, const Cut& cut)
      : arguments_(arguments), products_(products), cut_(cut) {}

  void work(Worker& worker) const {
    auto* sums = static_cast<SumTile*>(
        thread_scratch(Scratch::kSums, cut_.panel_groups * cut_.span_tiles * sizeof(SumTile)));
    products_.measure(worker);
    worker.each(cut_.tiles * chunks_, [&](int64_t item) { pack(item / chunks_, item % chunks_); });
    worker.begin(cut_.tasks(), cut_.shares);
    int64_t task = worker.claim();
    if (task < 0) return;
    const TileSession session(kTileColumns, kTileColumns);
    for (; task >= 0; task = worker.claim()) multiply(task, sums);
  }

 private:
  using Pass = cpu::Pass<Products>;
  using Block = typename Pass::Block;
  using Source = typename Pass::Source;
  static constexpr int64_t kMostChunkBlocks = Tuning::kChunkTiles / Products::kParts;

  // A pair of row groups and a chunk of inputs.
  struct Place {
    int64_t task, group, chunk;
  };

  int64_t chunk_blocks(int64_t chunk) const {
    return smaller(full_chunk_, cut_.blocks - chunk * full_chunk_);
  }
  char* packed(int64_t chunk, int64_t tile) const {
    return packed_x_ +
           (chunk * full_chunk_ * cut_.tiles + tile * chunk_blocks(chunk)) * Pass::kBlockBytes;
  }
  int64_t tokens(int64_t tile) const {
    return smaller(arguments_.m - tile * kTileColumns, kTileColumns);
  }

  void pack(int64_t tile, int64_t chunk) const {
    char* target = packed(chunk, tile);
    for (int64_t block = 0; block < chunk_blocks(chunk); ++block, target += Pass::kBlockBytes) {
      const int64_t input = (chunk * full_chunk_ + block) * kBlockInputs;
      products_.pack(tile * kTileColumns, tokens(tile), input, kTileColumns, target);
    }
  }

  // Of a place; nothing behind the last task.
  Source source(const Place& place) const {
    if (place.task >= cut_.tasks()) return {};
    const int64_t end = cut_.task(place.task).end_group;
    if (place.group >= end) return {};
    const auto* first = static_cast<const Block*>(arguments_.packed) + place.group * cut_.blocks +
                        place.chunk * full_chunk_;
    return {{first, place.group + 1 < end ? first + cut_.blocks : first},
            chunk_blocks(place.chunk)};
  }

  void set_tables(Source& source, const Place& place,
                  typename Pass::Tables (&tables)[kAmxGroups]) const {
    for (int group = 0; group < kAmxGroups; ++group) {
      tables[group] = typename Pass::Tables(
          arguments_, smaller(place.group + group, cut_.groups - 1), place.chunk * full_chunk_);
    }
    source.tables = tables;
    source.first_block = place.chunk * full_chunk_;
  }

  // All pairs of a panel, then the next chunk; then the task that this thread will most likely
  // take.
  Place after(Place place) const {
    if (place.task >= cut_.tasks()) return place;
    const Cut::Task task = cut_.task(place.task);
    place.group += kAmxGroups;
    if (place.group < task.end_group) return place;
    if (++place.chunk < chunks_) return {place.task, task.first_group, place.chunk};
    const int64_t next = place.task + 1;
    return {next, next < cut_.tasks() ? cut_.task(next).first_group : 0, 0};
  }

  // The activations of the chunk after this one, or of the first one of the next span; nothing
  // where all of them stay in L2.
  LineStream activations_after(int64_t chunk, int64_t span, int64_t steps) const {
    if (cut_.tiles * cut_.blocks * Pass::kBlockBytes <= Tuning::kKeptBytes) return {};
    const bool last = chunk + 1 == chunks_;
    const int64_t next = last ? 0 : chunk + 1;
    const int64_t next_span = last ? (span + 1) % cut_.spans : span;
    const int64_t bytes = cut_.span_size(next_span) * chunk_blocks(next) * Pass::kBlockBytes;
    return {packed(next, cut_.first_tile(next_span)), bytes / LineStream::kLine, steps};
  }

  void multiply(int64_t item, SumTile* sums) const {
    const Cut::Task task = cut_.task(item);
    if (task.first_group >= task.end_group) return;
    const int64_t tiles = cut_.span_size(task.span);
    const int64_t pairs = ceil_div(task.end_group - task.first_group, kAmxGroups);
    typename Pass::Weights weights[kMostChunkBlocks];
    Fetches fetches;
    Place place{item, task.first_group, 0};
    typename Pass::Tables tables[kAmxGroups];
    Source first = source(place);
    set_tables(first, place, tables);
    for (int64_t block = 0; block < first.blocks; ++block) {
      Pass::expand_block(first, block, weights[block]);
    }
    while (place.task == item) {
      const Place next = after(place);
      const int64_t steps = ceil_div(tiles, 2) * chunk_blocks(place.chunk);
      const Source fetched = source(after(next));  // `next` is expanded meanwhile
      for (int group = 0; group < kAmxGroups; ++group) {
        const int64_t lines = ceil_div(fetched.blocks * sizeof(Block), LineStream::kLine);
        fetches.weights[group] = LineStream(fetched.groups[group], lines, steps);
      }
      if (place.group == task.first_group) {
        fetches.activations = activations_after(place.chunk, task.span, steps * pairs);
      }
      const bool more = next.task == item;
      Source expanded;
      if (more) {
        expanded = source(next);
        set_tables(expanded, next, tables);
      }
      const auto sums_of = [&](int64_t group) {
        return sums + (group - task.first_group) * cut_.span_tiles;
      };
      multiply_chunk(place, expanded, task.span, weights, sums_of(place.group),
                     more ? sums_of(next.group) : sums, fetches);
      place = next;
    }
  }

  // `sums` are [token tile][row group], `next_sums` those of the place after this one.
  void multiply_chunk(const Place& place, const Source& next, int64_t span,
                      typename Pass::Weights* weights, SumTile* sums, const SumTile* next_sums,
                      Fetches& fetches) const {
    const int64_t first_tile = cut_.first_tile(span), tiles = cut_.span_size(span);
    const int64_t blocks = chunk_blocks(place.chunk), row = place.group * kAmxRows;
    const bool complete = place.chunk + 1 == chunks_;
    for (int64_t tile = 0; tile < tiles; tile += 2, sums += 2 * kAmxGroups) {
      const int64_t token = (first_tile + tile) * kTileColumns;
      if (complete) {
        fetches.outputs = LineStream(arguments_.y + token * arguments_.n + row,
                                     smaller(2 * kTileColumns, arguments_.m - token), blocks,
                                     arguments_.n * static_cast<int64_t>(sizeof(bf16)));
      }
      const char* x = packed(place.chunk, first_tile + tile);
      const bool start = place.chunk == 0;
      const int64_t left = tiles - tile - 2;
      if (arguments_.m > Tuning::kShortTokens) {  // the sums of a short panel are near L1 anyway
        fetches.sums = SumStream(left > 0 ? sums + 2 * kAmxGroups : next_sums,
                                 smaller(2, left > 0 ? left : tiles) * kAmxGroups);
      }
      if (tile + 2 < tiles) {
        load_sums<2>(sums, start);
        Pass::template multiply<2>(weights, x, blocks, fetches);
        store_sums<2>(sums);
      } else if (tile + 2 == tiles) {
        load_sums<2>(sums, start);
        Pass::template multiply<2>(weights, x, blocks, next, fetches);
        store_sums<2>(sums);
      } else {
        load_sums<1>(sums, start);
        Pass::template multiply<1>(weights, x, blocks, next, fetches);
        store_sums<1>(sums);
      }
      if (!complete) continue;
      for (int64_t t = 0; t < smaller(2, tiles - tile); ++t) {
        products_.write(sums[2 * t], sums[2 * t + 1], row, token + t * kTileColumns);
      }
    }
  }

  template <int TokenTiles>
  static void load_sums(const SumTile* sums, bool start) {
    if (start) return zero_sums();
    tile::load<kSum00>(sums[0].rows, kTileRowBytes);
    tile::load<kSum10>(sums[1].rows, kTileRowBytes);
    if constexpr (TokenTiles == 2) {
      tile::load<kSum01>(sums[2].rows, kTileRowBytes);
      tile::load<kSum11>(sums[3].rows, kTileRowBytes);
    }
  }

  template <int TokenTiles>
  static void store_sums(SumTile* sums) {
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
  const int64_t full_chunk_ = cut_.chunk_tiles / Products::kParts;  // blocks
  const int64_t chunks_ = ceil_div(cut_.blocks, full_chunk_);
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
