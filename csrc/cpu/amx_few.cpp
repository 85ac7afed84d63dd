// AMX, at most 32 tokens: bound by the stream of weights from memory.
//
// The weights are the A operand, so an expanded row is a tile row and needs no shuffle. A worker
// walks two row groups at once, which share the B tiles of the tokens. While it multiplies one
// block, it expands the block after it into the other half of a buffer in the L1 cache and fetches
// the one after that from memory, across the end of its row groups into the next ones.
#include "amx_queue.h"
#include "kernels.h"
#include "scratch.h"
#include "threads.h"

// Must follow the headers above.
#include "amx_target.h"

// Must follow amx_target.h.
#include "amx_expand.h"
#include "amx_pack.h"
#include "amx_tile.h"

namespace permllm::cpu {
namespace {

struct FewTokensTuning {
  static constexpr int64_t prefetch_blocks = 1;  // fetched so many blocks before it is expanded
  static constexpr int64_t pack_blocks = 16;     // blocks of x that a worker packs at a time
};

class FewTokens {
 public:
  FewTokens(const LinearArguments& arguments, int64_t workers, bf16* packed_x)
      : arguments_(arguments),
        packed_x_(packed_x),
        packs_(token_tiles_ * packs_per_tile_, workers),
        pairs_(ceil_div(groups_, 2), workers) {}

  void work(int64_t worker) {
    pack(worker);
    if (token_tiles_ == 1) {
      multiply<1>(worker);
    } else {
      multiply<2>(worker);
    }
  }

 private:
  // Where a worker stands in the two row groups that it walks together; where only one is left, it
  // is both of them.
  struct Pair {
    const AmxBlock* blocks0;
    const AmxBlock* blocks1;
    int64_t first_row;

    bool none() const { return blocks0 == nullptr; }
    Pair after(int64_t blocks) const { return {blocks0 + blocks, blocks1 + blocks, first_row}; }
  };

  int64_t tokens(int64_t tile) const {
    return smaller(arguments_.m - tile * kTileColumns, kTileColumns);
  }
  int columns(int64_t tile) const { return tile_columns(tokens(tile)); }
  bf16* packed_tile(int64_t tile) const {
    return packed_x_ + tile * input_blocks_ * packed_size(kTileColumns);
  }

  void pack(int64_t worker) {
    for (int64_t item; (item = packs_.claim(worker)) >= 0; packs_.finish()) {
      const int64_t tile = item / packs_per_tile_;
      const int64_t begin = item % packs_per_tile_ * FewTokensTuning::pack_blocks;
      const int64_t end = smaller(begin + FewTokensTuning::pack_blocks, input_blocks_);
      const bf16* x = arguments_.x + tile * kTileColumns * arguments_.x_stride;
      for (int64_t block = begin; block < end; ++block) {
        const int64_t input = block * kBlockInputs;
        pack_activations(x + input, arguments_.x_stride, tokens(tile), arguments_.k - input,
                         columns(tile), packed_tile(tile) + block * packed_size(columns(tile)));
      }
    }
    packs_.wait();
  }

  Pair claim_pair(int64_t worker) {
    const int64_t item = pairs_.claim(worker);
    if (item < 0) return {nullptr, nullptr, 0};
    const int64_t group = item * 2;
    const auto* blocks = static_cast<const AmxBlock*>(arguments_.packed) + group * input_blocks_;
    return {blocks, group + 1 < groups_ ? blocks + input_blocks_ : blocks, group * kAmxRows};
  }

  template <int TokenTiles>
  void multiply(int64_t worker) {
    constexpr int64_t kAhead = 1 + FewTokensTuning::prefetch_blocks;
    Pair pair = claim_pair(worker);
    if (pair.none()) return;
    const int64_t input_blocks = input_blocks_;
    const int64_t claim_at = larger(input_blocks - kAhead, 0);
    const int columns0 = columns(0), columns1 = columns(TokenTiles - 1);
    const TileSession session(columns0, columns1);
    WeightTiles buffers[2][2];  // [multiplied, expanded][row group]
    WeightTiles *multiplied = buffers[0], *expanded = buffers[1];
    expand(*pair.blocks0, multiplied[0]);
    expand(*pair.blocks1, multiplied[1]);
    while (!pair.none()) {
      zero_sums();
      Pair next{}, source = pair.after(1), fetched = pair.after(kAhead);
      const bf16* x0 = packed_tile(0);
      const bf16* x1 = packed_tile(TokenTiles - 1);
      for (int64_t block = 0; block < input_blocks; ++block) {
        if (block == claim_at) {
          next = claim_pair(worker);
          if (!next.none()) fetched = next;
        }
        if (block + 1 == input_blocks) source = next;
        if (!source.none()) {
          expand(*source.blocks0, expanded[0], fetched.blocks0);
          expand(*source.blocks1, expanded[1], fetched.blocks1);
        }
        multiply_block<TokenTiles>(multiplied, x0, x1, columns0, columns1);
        x0 += packed_size(columns0);
        x1 += packed_size(columns1);
        source = source.after(1);
        fetched = fetched.after(1);
        WeightTiles* reused = multiplied;
        multiplied = expanded;
        expanded = reused;
      }
      write<TokenTiles>(pair.first_row);
      pair = next;
    }
  }

  // With two token tiles, each has a B tile and its sums. With one, the halves of the block have,
  // so that a sum waits for the one before it half as often.
  template <int TokenTiles>
  static inline void multiply_block(const WeightTiles* weights, const bf16* x0, const bf16* x1,
                                    int columns0, int columns1) {
    const int64_t stride0 = columns0 * kPairBytes, stride1 = columns1 * kPairBytes;
    const int64_t half0 = packed_size(columns0) / 2, half1 = packed_size(columns1) / 2;
    if constexpr (TokenTiles == 1) {
      tile::load<kTokens0>(x0, stride0);
      tile::load<kWeights0>(weights[0].half[0], kTileRowBytes);
      tile::multiply_add<kSum00, kWeights0, kTokens0>();
      tile::load<kWeights1>(weights[1].half[0], kTileRowBytes);
      tile::multiply_add<kSum10, kWeights1, kTokens0>();
      tile::load<kTokens1>(x0 + half0, stride0);
      tile::load<kWeights0>(weights[0].half[1], kTileRowBytes);
      tile::multiply_add<kSum01, kWeights0, kTokens1>();
      tile::load<kWeights1>(weights[1].half[1], kTileRowBytes);
      tile::multiply_add<kSum11, kWeights1, kTokens1>();
    } else {
      for (int half = 0; half < 2; ++half) {
        tile::load<kTokens0>(x0 + half * half0, stride0);
        tile::load<kWeights0>(weights[0].half[half], kTileRowBytes);
        tile::multiply_add<kSum00, kWeights0, kTokens0>();
        tile::load<kWeights1>(weights[1].half[half], kTileRowBytes);
        tile::multiply_add<kSum10, kWeights1, kTokens0>();
        tile::load<kTokens1>(x1 + half * half1, stride1);
        tile::multiply_add<kSum01, kWeights0, kTokens1>();
        tile::multiply_add<kSum11, kWeights1, kTokens1>();
      }
    }
  }

  template <int TokenTiles>
  void write(int64_t first_row) const {
    SumTile sums[2][2];  // [row group][token tile, or half of the block]
    tile::store<kSum00>(sums[0][0].rows, kTileRowBytes);
    tile::store<kSum01>(sums[0][1].rows, kTileRowBytes);
    tile::store<kSum10>(sums[1][0].rows, kTileRowBytes);
    tile::store<kSum11>(sums[1][1].rows, kTileRowBytes);
    if constexpr (TokenTiles == 1) {
      add(sums[0][0], sums[0][1]);
      add(sums[1][0], sums[1][1]);
    }
    const OutputColumns out(arguments_.y, arguments_.n, first_row, arguments_.bias);
    for (int64_t tile = 0; tile < TokenTiles; ++tile) {
      store_outputs(sums[0][tile], sums[1][tile], tile * kTileColumns, tokens(tile), out);
    }
  }

  const LinearArguments& arguments_;
  bf16* const packed_x_;  // [token tile][block][half][input pair][column][2]
  const int64_t input_blocks_ = ceil_div(arguments_.k, kBlockInputs);
  const int64_t groups_ = ceil_div(arguments_.n, kAmxRows);
  const int64_t token_tiles_ = ceil_div(arguments_.m, kTileColumns);
  const int64_t packs_per_tile_ = ceil_div(input_blocks_, FewTokensTuning::pack_blocks);
  WorkQueue packs_;
  WorkQueue pairs_;
};

}  // namespace

void amx_few_tokens(const LinearArguments& arguments) {
  const int64_t pairs = ceil_div(ceil_div(arguments.n, kAmxRows), 2);
  const int64_t workers = smaller(thread_count(), pairs);
  const int64_t packed = ceil_div(arguments.m, kTileColumns) * ceil_div(arguments.k, kBlockInputs) *
                         packed_size(kTileColumns);
  FewTokens few(arguments, workers,
                static_cast<bf16*>(thread_scratch(Scratch::kActivations, packed * sizeof(bf16))));
  parallel_for(workers, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) few.work(worker);
  });
}

}  // namespace permllm::cpu
