// AMX, int8 values, at most 32 tokens: W8A8. A block of 64 inputs is one B tile of 16 tokens.
#include "cpu/amx/few.h"
#include "cpu/amx/quantize.h"

namespace permllm::cpu {
namespace {

template <class V>
struct Int8Products {
  using Value = V;
  using Block = permllm::cpu::Block<kAmxRows, V>;
  using Tiles = Int8WeightTile;
  static constexpr int kTokenTiles = 2;
  static constexpr int kBlockTiles = 1;

  QuantizedTokens<kLargest8> x;

  void measure(Worker& worker) const { x.measure(worker); }

  void pack(int64_t token, int64_t tokens, int64_t input, int columns, char* tile) const {
    x.pack_bytes(token, tokens, input, columns, tile);
  }

  template <int TokenTiles>
  static inline void multiply_block(const Int8WeightTile* weights, const char* x0, const char* x1,
                                    int columns0, int columns1) {
    tile::load<kTokens0>(x0, columns0 * kPairBytes);
    tile::load<kWeights0>(weights[0].rows, kTileRowBytes);
    tile::multiply_add_int8<kSum00, kWeights0, kTokens0>();
    tile::load<kWeights1>(weights[1].rows, kTileRowBytes);
    tile::multiply_add_int8<kSum10, kWeights1, kTokens0>();
    if constexpr (TokenTiles == 2) {
      tile::load<kTokens1>(x1, columns1 * kPairBytes);
      tile::multiply_add_int8<kSum01, kWeights0, kTokens1>();
      tile::multiply_add_int8<kSum11, kWeights1, kTokens1>();
    }
  }

  template <int TokenTiles>
  [[gnu::noinline]] void write(const PairSums& sums, int64_t row, OutputPanel& panel) const {
    const OutputColumns out = panel.columns(row);
    for (int tile = 0; tile < TokenTiles; ++tile) {
      x.write(out, row, tile * kTileColumns,
              [&](int group, int r) { return to_float(sums.tiles[group][tile].rows[r]); });
    }
  }
};

}  // namespace

template <class Value>
void amx_int8_several_tokens(const LinearArguments& a, Worker& worker) {
  multiply_few_tokens(a, Int8Products<Value>{QuantizedTokens<kLargest8>(a)}, worker);
}

template void amx_int8_several_tokens<int8_t>(const LinearArguments&, Worker&);
template void amx_int8_several_tokens<int4>(const LinearArguments&, Worker&);
template void amx_int8_several_tokens<dense8>(const LinearArguments&, Worker&);

}  // namespace permllm::cpu
