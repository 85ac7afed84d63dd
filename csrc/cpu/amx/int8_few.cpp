// AMX, int8 values, at most 16 tokens: W8A16.
//
// x is a 16-bit integer, 256 times its signed upper byte plus its unsigned lower byte. The bytes
// are a B tile each, and take the place of two token tiles: the second product reads nothing from
// memory, and the values are never converted.
#include "cpu/amx/few.h"
#include "cpu/amx/quantize.h"

namespace permllm::cpu {
namespace {

template <class V>
struct Int8SplitProducts {
  using Value = V;
  using Block = permllm::cpu::Block<kAmxRows, V>;
  using Tiles = Int8WeightTile;
  static constexpr int kTokenTiles = 1;
  static constexpr int kBlockTiles = 2;

  QuantizedTokens<kLargest16> x;

  void measure(Worker& worker) const { x.measure(worker); }

  void pack(int64_t token, int64_t tokens, int64_t input, int columns, char* tiles) const {
    __m512i upper[16], lower[16];
    for (int64_t t = 0; t < 16; ++t) {
      upper[t] = lower[t] = _mm512_setzero_si512();
      if (t >= tokens) continue;
      __m512i integers[4];
      x.quantize(token + t, input, integers);
      upper[t] = to_bytes(integers, 8);
      lower[t] = to_bytes(integers, 0);
    }
    store_tile(upper, columns, tiles);
    store_tile(lower, columns, tiles + tile_bytes(columns));
  }

  template <int TokenTiles>
  static inline void multiply_block(const Int8WeightTile* weights, const char* bytes, const char*,
                                    int columns, int) {
    const int64_t stride = columns * kPairBytes;
    tile::load<kTokens0>(bytes, stride);
    tile::load<kWeights0>(weights[0].rows, kTileRowBytes);
    tile::multiply_add_int8<kSum00, kWeights0, kTokens0>();
    tile::load<kWeights1>(weights[1].rows, kTileRowBytes);
    tile::multiply_add_int8<kSum10, kWeights1, kTokens0>();
    tile::load<kTokens1>(bytes + tile_bytes(columns), stride);
    tile::multiply_add_uint8<kSum01, kWeights0, kTokens1>();
    tile::multiply_add_uint8<kSum11, kWeights1, kTokens1>();
  }

  template <int TokenTiles>
  [[gnu::noinline]] void write(const PairSums& sums, int64_t row, OutputPanel& panel) const {
    x.write(panel.columns(row), row, 0, [&](int group, int r) {
      const SumTile(&bytes)[2] = sums.tiles[group];  // sums of the upper and of the lower bytes
      return _mm512_fmadd_ps(to_float(bytes[0].rows[r]), _mm512_set1_ps(256.0f),
                             to_float(bytes[1].rows[r]));
    });
  }
};

}  // namespace

template <class Value>
void amx_int8_few_tokens(const LinearArguments& a, Worker& worker) {
  multiply_few_tokens(a, Int8SplitProducts<Value>{QuantizedTokens<kLargest16>(a)}, worker);
}

template void amx_int8_few_tokens<int8_t>(const LinearArguments&, Worker&);
template void amx_int8_few_tokens<int4>(const LinearArguments&, Worker&);
template void amx_int8_few_tokens<dense8>(const LinearArguments&, Worker&);

}  // namespace permllm::cpu
