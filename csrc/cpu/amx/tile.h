// The AMX tile unit: eight registers of at most 16 rows x 64 bytes, set up per thread.
//
// The only file that names its instructions. They are assembly because the intrinsics of GCC take
// the register as a literal, not as a template argument, and because its `_tile_loadd` does not
// declare that it reads memory: the stores that fill a tile's source could be moved behind it.
// The process must have been granted the tile state by the kernel (see isa.h).
#pragma once

#include <cstdint>

#ifdef PERMLLM_EMULATE_AMX
#include "tile_emulation.h"
#else

namespace permllm::cpu {
namespace {
namespace tile {

inline void configure(const void* config) {
  asm volatile("ldtilecfg (%0)" : : "r"(config) : "memory");
}

inline void release() { asm volatile("tilerelease" : : : "memory"); }

template <int Tile>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(Tile));
}

// Rows are `stride` bytes apart; as many rows and bytes as the tile is configured for.
template <int Tile>
inline void load(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(Tile) : "memory");
}

// The same for what no product soon needs again: it leaves to others their place in L1.
template <int Tile>
inline void load_once(const void* rows, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(Tile) : "memory");
}

template <int Tile>
inline void store(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(Tile) : "memory");
}

// C[i][j] += sum over p of A[i][2p] B[p][2j] + A[i][2p+1] B[p][2j+1]: bfloat16 in, float32 out,
// denormals are zero on both sides.
template <int C, int A, int B>
inline void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

// C[i][j] += sum over q and b of A[i][4q+b] B[q][4j+b]: int8 in, int32 out.
template <int C, int A, int B>
inline void multiply_add_int8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

// The same for an unsigned B.
template <int C, int A, int B>
inline void multiply_add_uint8() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

}  // namespace tile
}  // namespace
}  // namespace permllm::cpu

#endif  // PERMLLM_EMULATE_AMX

namespace permllm::cpu {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;

// The memory operand of ldtilecfg.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int row_count, int bytes) {
    rows[tile] = static_cast<uint8_t>(row_count);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};
static_assert(sizeof(TileConfig) == 64);

// Registers of both kernels: 2 row groups x 2 token tiles.
constexpr int kWeights0 = 4, kWeights1 = 5;  // A: 16 rows x 32 inputs, 64 of int8
constexpr int kTokens0 = 6, kTokens1 = 7;    // B: 16 input pairs or quads x columns
constexpr int kSum00 = 0, kSum01 = 1;        // C of row group 0, by B tile
constexpr int kSum10 = 2, kSum11 = 3;        // C of row group 1

// Owns this thread's tile unit. `columns0` and `columns1` are the columns of the two B tiles,
// `rows` those of A and of the sums.
class TileSession {
 public:
  TileSession(int columns0, int columns1, int rows = kTileRows) {
    constexpr int kPairBytes = 4;
    TileConfig config;
    config.set(kWeights0, rows, kTileRowBytes);
    config.set(kWeights1, rows, kTileRowBytes);
    config.set(kTokens0, kTileRows, columns0 * kPairBytes);
    config.set(kSum00, rows, columns0 * kPairBytes);
    config.set(kSum10, rows, columns0 * kPairBytes);
    config.set(kTokens1, kTileRows, columns1 * kPairBytes);
    config.set(kSum01, rows, columns1 * kPairBytes);
    config.set(kSum11, rows, columns1 * kPairBytes);
    tile::configure(&config);
  }
  ~TileSession() { tile::release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

inline void zero_sums() {
  tile::zero<kSum00>();
  tile::zero<kSum01>();
  tile::zero<kSum10>();
  tile::zero<kSum11>();
}

}  // namespace
}  // namespace permllm::cpu
