// AMX for few tokens: bound by the stream of weights from memory.
//
// The weights are the A operand, so an expanded row is a tile row and needs no shuffle. A worker
// walks two row groups at once, which share the B tiles of the tokens. While it multiplies one
// block, it expands the block after it into the other half of a buffer in the L1 cache and fetches
// one further on from memory, across the end of its row groups into the next ones.
//
// Nothing is fetched while the worker waits, so it does not wait for its sums. They are read some
// blocks after they were stored. And a tile store takes 0.3 us longer if half a microsecond has
// passed since the last one: where the next pair is claimed, a sum that is not complete is stored,
// which nothing waits for.
//
// A template over the products, a class with the types Block and Tiles (a block, expanded),
// kTokenTiles (tiles of 16 tokens, at most), kBlockTiles (B tiles of a block and so many tokens),
// and
//   measure         a phase, before any token is packed
//   pack            64 inputs of up to 16 tokens to their B tiles
//   multiply_block  of two row groups
//   write           the stored sums of two row groups to a panel of outputs
#pragma once

#include "cpu/kernels.h"
#include "cpu/threads/team.h"

// Must follow the headers above.
#include "cpu/amx/target.h"

// Must follow amx/target.h.
#include "cpu/amx/expand.h"
#include "cpu/amx/pack.h"
#include "cpu/amx/panel.h"
#include "cpu/amx/tile.h"

namespace permllm::cpu {
namespace {

// The sums of two row groups, in the order of the registers.
struct PairSums {
  SumTile tiles[2][2];  // [row group][B tile]

  void store() {
    tile::store<kSum00>(tiles[0][0].rows, kTileRowBytes);
    tile::store<kSum01>(tiles[0][1].rows, kTileRowBytes);
    tile::store<kSum10>(tiles[1][0].rows, kTileRowBytes);
    tile::store<kSum11>(tiles[1][1].rows, kTileRowBytes);
  }
};

template <class Products>
class FewTokens {
 public:
  FewTokens(const LinearArguments& arguments, const Products& products)
      : arguments_(arguments), products_(products) {}

  void work(Worker& worker) {
    products_.measure(worker);
    worker.each(token_tiles_ * packs_per_tile_, [&](int64_t item) { pack(item); });
    if (Products::kTokenTiles == 1 || token_tiles_ == 1) {
      multiply<1>(worker);
    } else {
      multiply<Products::kTokenTiles>(worker);
    }
  }

 private:
  using Block = typename Products::Block;
  using Tiles = typename Products::Tiles;
  using Tables = GroupTables<typename Products::Value>;

  // Where a worker stands in the two row groups that it walks together; where only one is left, it
  // is both of them.
  struct Pair {
    const Block* blocks0;
    const Block* blocks1;
    int64_t first_row;

    bool none() const { return blocks0 == nullptr; }
    Pair after(int64_t blocks) const { return {blocks0 + blocks, blocks1 + blocks, first_row}; }
  };

  int64_t tokens(int64_t tile) const {
    return smaller(arguments_.m - tile * kTileColumns, kTileColumns);
  }
  int columns(int64_t tile) const { return tile_columns(tokens(tile)); }
  char* packed_tile(int64_t tile) const {
    return packed_x_ + tile * input_blocks_ * block_bytes(kTileColumns);
  }

  void pack(int64_t item) const {
    const int64_t tile = item / packs_per_tile_;
    const int64_t begin = item % packs_per_tile_ * Tuning::kPackBlocks;
    const int64_t end = smaller(begin + Tuning::kPackBlocks, input_blocks_);
    for (int64_t block = begin; block < end; ++block) {
      products_.pack(tile * kTileColumns, tokens(tile), block * kBlockInputs, columns(tile),
                     packed_tile(tile) + block * block_bytes(columns(tile)));
    }
  }

  Pair claim_pair(Worker& worker) const {
    const int64_t item = worker.claim();
    if (item < 0) return {nullptr, nullptr, 0};
    const int64_t group = item * kAmxGroups;
    const auto* blocks = static_cast<const Block*>(arguments_.packed) + group * input_blocks_;
    return {blocks, group + 1 < groups_ ? blocks + input_blocks_ : blocks, group * kAmxRows};
  }

  template <int TokenTiles>
  void multiply(Worker& worker) const {
    constexpr int64_t kBlock = sizeof(Block);
    constexpr int64_t kAhead = 1 + (Tuning::kFewAheadBytes + kBlock / 2) / kBlock;  // blocks
    worker.begin(ceil_div(groups_, kAmxGroups), worker.count());
    Pair pair = claim_pair(worker);
    if (pair.none()) return;
    const int64_t input_blocks = input_blocks_;
    const int64_t claim_at = larger(input_blocks - kAhead, 0);
    const int64_t write_at = smaller(Tuning::kFewWriteBlocks, input_blocks - 1);
    const int columns0 = columns(0), columns1 = columns(TokenTiles - 1);
    const TileSession session(columns0, columns1);
    Tiles buffers[2][2];  // [multiplied, expanded][row group]
    Tiles *multiplied = buffers[0], *expanded = buffers[1];
    Tables tables[2];  // [row group], of the pair that is expanded
    OutputPanel panel(arguments_);
    PairSums sums;
    SumTile incomplete;
    int64_t written_row = -1;  // where `sums` go, if they wait
    set_tables(pair, tables);
    expand(*pair.blocks0, 0, tables[0], multiplied[0]);
    expand(*pair.blocks1, 0, tables[1], multiplied[1]);
    while (!pair.none()) {
      zero_sums();
      prefetch_scales(pair.first_row);
      Pair next{}, source = pair.after(1), fetched = pair.after(kAhead);
      const char* x0 = packed_tile(0);
      const char* x1 = packed_tile(TokenTiles - 1);
      for (int64_t block = 0; block < input_blocks; ++block) {
        if (block == write_at && written_row >= 0) [[unlikely]] {
          products_.template write<TokenTiles>(sums, written_row, panel);
          written_row = -1;
        }
        if (block == claim_at) [[unlikely]] {
          next = claim_pair(worker);
          if (!next.none()) fetched = next;
          tile::store<kSum00>(incomplete.rows, kTileRowBytes);
        }
        int64_t number = block + 1;
        if (number == input_blocks) {
          source = next;
          number = 0;
          if (!next.none()) set_tables(next, tables);
        }
        if (!source.none()) {
          expand(*source.blocks0, number, tables[0], expanded[0], fetched.blocks0);
          expand(*source.blocks1, number, tables[1], expanded[1], fetched.blocks1);
          source = source.after(1);
        }
        Products::template multiply_block<TokenTiles>(multiplied, x0, x1, columns0, columns1);
        x0 += block_bytes(columns0);
        x1 += block_bytes(columns1);
        fetched = fetched.after(1);
        Tiles* reused = multiplied;
        multiplied = expanded;
        expanded = reused;
      }
      sums.store();
      written_row = pair.first_row;
      pair = next;
    }
    products_.template write<TokenTiles>(sums, written_row, panel);
  }

  void set_tables(const Pair& pair, Tables (&tables)[2]) const {
    const int64_t group = pair.first_row / kAmxRows;
    tables[0] = Tables(arguments_, group);
    tables[1] = Tables(arguments_, smaller(group + 1, groups_ - 1));
  }

  // Of two row groups, of int8 values; wanted when their sums are written.
  void prefetch_scales(int64_t first_row) const {
    if (arguments_.scale == nullptr) return;
    for (int group = 0; group < kAmxGroups; ++group) {
      prefetch<kIntoL1>(arguments_.scale + first_row + group * kAmxRows);
    }
  }

  // Of the B tiles of one block.
  static constexpr int64_t block_bytes(int columns) {
    return Products::kBlockTiles * tile_bytes(columns);
  }

  const LinearArguments& arguments_;
  const Products& products_;
  char* const packed_x_ = static_cast<char*>(arguments_.packed_x);  // [token tile][block][B tile]
  const int64_t input_blocks_ = ceil_div(arguments_.k, kBlockInputs);
  const int64_t groups_ = ceil_div(arguments_.n, kAmxRows);
  const int64_t token_tiles_ = ceil_div(arguments_.m, kTileColumns);
  const int64_t packs_per_tile_ = ceil_div(input_blocks_, Tuning::kPackBlocks);
};

template <class Products>
void multiply_few_tokens(const LinearArguments& a, const Products& products, Worker& worker) {
  FewTokens<Products>(a, products).work(worker);
}

}  // namespace
}  // namespace permllm::cpu
