// AMX, bfloat16 values, at most 32 tokens.
#include "cpu/amx/few.h"

namespace permllm::cpu {
namespace {

template <class V>
struct Bf16Products {
  using Value = V;
  using Block = permllm::cpu::Block<kAmxRows, V>;
  using Tiles = WeightTiles;
  static constexpr int kTokenTiles = 2;
  static constexpr int kBlockTiles = 2;

  const LinearArguments& a;

  static void measure(Worker&) {}

  void pack(int64_t token, int64_t tokens, int64_t input, int columns, char* tiles) const {
    pack_activations(a, token, tokens, input, columns, tiles);
  }

  // With two token tiles, each has a B tile and its sums, and adds in the order of amx/many.cpp.
  // With one, the halves of the block have, so that a sum waits for the one before it half as
  // often: the last bits of up to 16 tokens are others.
  template <int TokenTiles>
  static inline void multiply_block(const WeightTiles* weights, const char* x0, const char* x1,
                                    int columns0, int columns1) {
    const int64_t stride0 = columns0 * kPairBytes, stride1 = columns1 * kPairBytes;
    const int64_t half0 = tile_bytes(columns0), half1 = tile_bytes(columns1);
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
  [[gnu::noinline]] void write(PairSums& sums, int64_t first_row, OutputPanel& panel) const {
    if constexpr (TokenTiles == 1) {
      for (SumTile(&group)[2] : sums.tiles) add(group[0], group[1]);
    }
    const OutputColumns out = panel.columns(first_row);
    for (int64_t tile = 0; tile < TokenTiles; ++tile) {
      const int64_t first = tile * kTileColumns;
      store_outputs(sums.tiles[0][tile], sums.tiles[1][tile], first,
                    smaller(a.m - first, kTileColumns), out);
    }
  }
};

}  // namespace

template <class Value>
void amx_few_tokens(const LinearArguments& a, Worker& worker) {
  multiply_few_tokens(a, Bf16Products<Value>{a}, worker);
}

template void amx_few_tokens<bf16>(const LinearArguments&, Worker&);
template void amx_few_tokens<bf12>(const LinearArguments&, Worker&);
template void amx_few_tokens<dense12>(const LinearArguments&, Worker&);

}  // namespace permllm::cpu
