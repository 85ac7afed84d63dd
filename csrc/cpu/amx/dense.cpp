// AMX for up to 64 tokens and dense rows, which are read in place.
//
// The 16 rows of an A tile are some rows apart, and the next tile has the rows behind them, so that
// memory is read in 16 streams of consecutive rows. A tile meets up to 4 B tiles of 16 tokens. Sums
// of 256 rows wait for each other, in the order of their rows, and are rounded together.
#include "cpu/dense.h"

#include <utility>

#include "cpu/memory/scratch.h"
#include "cpu/threads/phases.h"

// Must follow the headers above.
#include "cpu/amx/target.h"

// Must follow amx/target.h.
#include "cpu/amx/pack.h"
#include "cpu/amx/tile.h"

namespace permllm::cpu {
namespace {

using Tuning = AmxTuning;
constexpr int kGroup = kTileRows * Tuning::kDenseRowsApart;  // rows
static_assert(kDenseInputs * sizeof(bf16) == kTileRowBytes);

// `TokenTiles` hold all tokens.
template <int TokenTiles>
class AmxDense {
 public:
  static constexpr int64_t kPreparedAlone = Tuning::kPreparedAlone;

  explicit AmxDense(const LinearArguments& a)
      : arguments_(a), columns_(TokenTiles == 1 ? tile_columns(a.m) : kTileColumns) {}

  int64_t elements() const { return arguments_.m * arguments_.k; }
  static int64_t measures() { return 0; }
  static void measure(int64_t) {}
  int64_t packs() const { return TokenTiles * ceil_div(blocks_, Tuning::kPackBlocks); }
  int64_t groups() const { return ceil_div(arguments_.n, kGroup); }

  // Packed x is [token tile][32 inputs][B tile].
  void pack(int64_t item) const {
    const int64_t first_token = item % TokenTiles * kTileColumns;
    const int64_t tokens = smaller(arguments_.m - first_token, kTileColumns);
    const int64_t begin = item / TokenTiles * Tuning::kPackBlocks;
    for (int64_t block = begin; block < smaller(begin + Tuning::kPackBlocks, blocks_); ++block) {
      pack_activations(arguments_, first_token, tokens, block * kBlockInputs, columns_,
                       packed_tile(item % TokenTiles, 2 * block));
    }
  }

  void run(int64_t begin, int64_t end) const {
    auto* sums = static_cast<SumTile*>(thread_scratch(
        Scratch::kSums, TokenTiles * Tuning::kDenseRowsApart * int64_t{sizeof(SumTile)}));
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kGroup, rows = smaller(arguments_.n - first, kGroup);
      const int64_t apart = rows / kTileRows, rest = rows % kTileRows;
      if (apart > 0) multiply(first, kTileRows, apart, sums);
      if (rest > 0) multiply(first + rows - rest, static_cast<int>(rest), 1, sums + apart);
      for (int64_t row = 0; row < rows; row += 2 * kTileRows) {
        const OutputColumns out(arguments_, first + row);
        for (int tile = 0; tile < TokenTiles; ++tile) {
          const int64_t token = tile * kTileColumns;
          const SumTile* of_tile = sums + tile * Tuning::kDenseRowsApart + row / kTileRows;
          store_outputs(of_tile[0], of_tile[1], token, smaller(arguments_.m - token, kTileColumns),
                        out);
        }
      }
    }
  }

 private:
  char* packed_tile(int64_t tile, int64_t vector) const {
    return static_cast<char*>(arguments_.packed_x) +
           (tile * 2 * blocks_ + vector) * tile_bytes(columns_);
  }

  // `tile_rows` times `apart` rows.
  void multiply(int64_t first, int tile_rows, int64_t apart, SumTile* sums) const {
    const TileSession session(columns_, columns_, tile_rows);
    const int64_t row_bytes = arguments_.k * int64_t{sizeof(bf16)};
    const char* weights = static_cast<const char*>(arguments_.packed) + first * row_bytes;
    for (int64_t i = 0; i < apart; ++i, weights += row_bytes) {
      multiply_tile(weights, apart * row_bytes, std::make_integer_sequence<int, TokenTiles>());
      store_sums(sums->rows[i], apart, std::make_integer_sequence<int, TokenTiles>());
    }
  }

  template <int... Tile>
  void multiply_tile(const char* weights, int64_t stride,
                     std::integer_sequence<int, Tile...>) const {
    const int64_t vectors = arguments_.k / kDenseInputs;
    const char* x[] = {packed_tile(Tile, 0)...};
    (tile::zero<Tile>(), ...);
    for (int64_t v = 0; v < vectors; ++v, weights += kTileRowBytes) {
      const char* ahead = weights + Tuning::kDenseAhead;
#pragma GCC unroll 16
      for (int row = 0; row < kTileRows; ++row, ahead += stride) {
        __builtin_prefetch(ahead, 0, Tuning::kDenseHint);
      }
      tile::load<kWeights0>(weights, stride);
      (multiply_tokens<Tile>(x[Tile] + v * tile_bytes(columns_)), ...);
    }
  }

  template <int Tile>
  void multiply_tokens(const char* x) const {
    constexpr int kTokens = Tile % 2 == 0 ? kTokens0 : kTokens1;
    tile::load<kTokens>(x, columns_ * kPairBytes);
    tile::multiply_add<Tile, kWeights0, kTokens>();
  }

  template <int... Tile>
  static void store_sums(float* first, int64_t apart, std::integer_sequence<int, Tile...>) {
    constexpr int64_t kOfTile = Tuning::kDenseRowsApart * int64_t{sizeof(SumTile)} / sizeof(float);
    (tile::store<Tile>(first + Tile * kOfTile, apart * kTileRowBytes), ...);
  }

  LinearArguments arguments_;
  int columns_;
  int64_t blocks_ = ceil_div(arguments_.k, kBlockInputs);
};

template <int TokenTiles>
void multiply_dense(const LinearArguments& a, Worker& worker) {
  go_through(AmxDense<TokenTiles>(a), a.last, worker);
}

}  // namespace

void amx_dense(const LinearArguments& a, Worker& worker) {
  if (a.m <= kTileColumns) return multiply_dense<1>(a, worker);
  if (a.m <= 2 * kTileColumns) return multiply_dense<2>(a, worker);
  if (a.m <= 3 * kTileColumns) return multiply_dense<3>(a, worker);
  multiply_dense<4>(a, worker);
}

}  // namespace permllm::cpu
