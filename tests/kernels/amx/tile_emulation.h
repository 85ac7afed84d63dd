// The AMX tile unit in software, for CPUs that have none: what amx/tile.h includes under
// PERMLLM_EMULATE_AMX. Same results as the hardware, bit by bit (the operations of TDPBF16PS,
// TDPBSSD and TDPBSUD in Intel's instruction set reference), and it records what the hardware would
// fault on, and more: a row stride smaller than a row, a tile unit that is set up twice or left set
// up.
#pragma once

#include <xmmintrin.h>

#include <atomic>
#include <cstdint>
#include <cstring>

namespace tile_emulation {

constexpr int kTiles = 8;
constexpr int kMaxRows = 16;
constexpr int kMaxRowBytes = 64;

struct Tile {
  int rows = 0;  // 0: not configured
  int row_bytes = 0;
  alignas(64) uint8_t data[kMaxRows][kMaxRowBytes] = {};
};

struct Unit {
  bool configured = false;
  Tile tiles[kTiles];
};

inline thread_local Unit unit;
inline std::atomic<int> configured_units{0};
inline std::atomic<const char*> first_violation{nullptr};
inline std::atomic<int64_t> multiply_adds{0};

// False, and recorded, when the rule is broken; the operation is then left out.
inline bool check(bool holds, const char* rule) {
  const char* none = nullptr;
  if (!holds) first_violation.compare_exchange_strong(none, rule);
  return holds;
}

inline bool check_tile(int tile) {
  return check(unit.configured, "tile used without a configuration, or after its release") &&
         check(tile >= 0 && tile < kTiles, "tile number above 7") &&
         check(unit.tiles[tile].rows > 0, "tile used that is not configured");
}

inline void configure(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  check(!unit.configured, "tile unit configured twice");
  check(bytes[0] == 1, "palette is not 1");
  for (int i = 1; i < 16; ++i) check(bytes[i] == 0, "start row or reserved byte is not 0");
  for (int tile = 0; tile < 16; ++tile) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * tile, sizeof(row_bytes));
    const int rows = bytes[48 + tile];
    check(tile < kTiles || (rows == 0 && row_bytes == 0), "tile above 7 configured");
    check(rows <= kMaxRows && row_bytes <= kMaxRowBytes, "tile larger than 16 rows x 64 bytes");
    check((rows == 0) == (row_bytes == 0), "tile with rows but no columns, or the reverse");
    if (tile >= kTiles) continue;
    unit.tiles[tile] = Tile{};
    unit.tiles[tile].rows = rows;
    unit.tiles[tile].row_bytes = row_bytes;
  }
  if (!unit.configured) ++configured_units;
  unit.configured = true;
}

inline void release() {
  if (!check(unit.configured, "tile unit released without a configuration")) return;
  unit = Unit{};
  --configured_units;
}

inline void zero(int tile) {
  if (!check_tile(tile)) return;
  std::memset(unit.tiles[tile].data, 0, sizeof(Tile::data));
}

inline void load(int tile, const void* source, int64_t stride) {
  if (!check_tile(tile)) return;
  Tile& target = unit.tiles[tile];
  if (!check(stride >= target.row_bytes, "rows of a loaded tile overlap: wrong configuration"))
    return;
  std::memset(target.data, 0, sizeof(target.data));
  for (int row = 0; row < target.rows; ++row) {
    std::memcpy(target.data[row], static_cast<const char*>(source) + row * stride,
                target.row_bytes);
  }
}

inline void store(int tile, void* target, int64_t stride) {
  if (!check_tile(tile)) return;
  const Tile& source = unit.tiles[tile];
  if (!check(stride >= source.row_bytes, "rows of a stored tile overlap: wrong configuration"))
    return;
  for (int row = 0; row < source.rows; ++row) {
    std::memcpy(static_cast<char*>(target) + row * stride, source.data[row], source.row_bytes);
  }
}

inline float widen(const uint8_t* bf16) {
  uint16_t bits;
  std::memcpy(&bits, bf16, sizeof(bits));
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// Even and odd inputs are summed apart, in ascending order with fused multiply-adds, then together,
// then into C. Not inlined, for it must run between the two changes of the rounding controls.
__attribute__((noinline)) inline void sum_products(Tile& c, const Tile& a, const Tile& b) {
  const int pairs = a.row_bytes / 4, columns = c.row_bytes / 4;
  for (int row = 0; row < c.rows; ++row) {
    float even[kMaxRowBytes / 4] = {}, odd[kMaxRowBytes / 4] = {};
    for (int pair = 0; pair < pairs; ++pair) {
      const float a_even = widen(a.data[row] + 4 * pair);
      const float a_odd = widen(a.data[row] + 4 * pair + 2);
      for (int column = 0; column < columns; ++column) {
        const uint8_t* b_pair = b.data[pair] + 4 * column;
        even[column] = __builtin_fmaf(a_even, widen(b_pair), even[column]);
        odd[column] = __builtin_fmaf(a_odd, widen(b_pair + 2), odd[column]);
      }
    }
    for (int column = 0; column < columns; ++column) {
      float sum;
      std::memcpy(&sum, c.data[row] + 4 * column, sizeof(sum));
      sum += even[column] + odd[column];
      std::memcpy(c.data[row] + 4 * column, &sum, sizeof(sum));
    }
  }
}

// Sums of four products, modulo 2^32, which no sum of a valid call reaches.
template <class ByteOfB>
inline void sum_byte_products(Tile& c, const Tile& a, const Tile& b) {
  const int quads = a.row_bytes / 4, columns = c.row_bytes / 4;
  for (int row = 0; row < c.rows; ++row) {
    for (int column = 0; column < columns; ++column) {
      int32_t start;
      std::memcpy(&start, c.data[row] + 4 * column, sizeof(start));
      int64_t sum = start;
      for (int quad = 0; quad < quads; ++quad) {
        for (int byte = 0; byte < 4; ++byte) {
          sum += static_cast<int8_t>(a.data[row][4 * quad + byte]) *
                 static_cast<ByteOfB>(b.data[quad][4 * column + byte]);
        }
      }
      check(sum == static_cast<int32_t>(sum), "sum of bytes leaves 32 bits");
      start = static_cast<int32_t>(sum);
      std::memcpy(c.data[row] + 4 * column, &start, sizeof(start));
    }
  }
}

// Whether C += A B is allowed.
inline bool check_product(int c, int a, int b) {
  if (!check_tile(c) || !check_tile(a) || !check_tile(b)) return false;
  const Tile &tile_c = unit.tiles[c], &tile_a = unit.tiles[a], &tile_b = unit.tiles[b];
  return check(c != a && c != b && a != b, "multiply-add of a tile with itself") &&
         check(tile_c.rows == tile_a.rows, "rows of C and A differ") &&
         check(tile_c.row_bytes == tile_b.row_bytes, "columns of C and B differ") &&
         check(tile_a.row_bytes == tile_b.rows * 4, "columns of A and rows of B differ") &&
         check(tile_a.row_bytes % 4 == 0 && tile_b.row_bytes % 4 == 0, "half a pair in a row");
}

inline void multiply_add(int c, int a, int b) {
  if (!check_product(c, a, b)) return;
  constexpr unsigned kExceptionsMasked = 0x1f80, kDenormalsAreZero = 0x8040;
  const unsigned controls = _mm_getcsr();
  _mm_setcsr(kExceptionsMasked | kDenormalsAreZero);  // rounding to nearest even
  sum_products(unit.tiles[c], unit.tiles[a], unit.tiles[b]);
  _mm_setcsr(controls);
  ++multiply_adds;
}

template <class ByteOfB>
inline void multiply_add_bytes(int c, int a, int b) {
  if (!check_product(c, a, b)) return;
  sum_byte_products<ByteOfB>(unit.tiles[c], unit.tiles[a], unit.tiles[b]);
  ++multiply_adds;
}

}  // namespace tile_emulation

// The interface of amx/tile.h.
namespace permllm::cpu {
namespace {
namespace tile {

inline void configure(const void* config) { tile_emulation::configure(config); }
inline void release() { tile_emulation::release(); }

template <int Tile>
inline void zero() {
  tile_emulation::zero(Tile);
}

template <int Tile>
inline void load(const void* rows, int64_t stride) {
  tile_emulation::load(Tile, rows, stride);
}

template <int Tile>
inline void load_once(const void* rows, int64_t stride) {
  tile_emulation::load(Tile, rows, stride);
}

template <int Tile>
inline void store(void* rows, int64_t stride) {
  tile_emulation::store(Tile, rows, stride);
}

template <int C, int A, int B>
inline void multiply_add() {
  tile_emulation::multiply_add(C, A, B);
}

template <int C, int A, int B>
inline void multiply_add_int8() {
  tile_emulation::multiply_add_bytes<int8_t>(C, A, B);
}

template <int C, int A, int B>
inline void multiply_add_uint8() {
  tile_emulation::multiply_add_bytes<uint8_t>(C, A, B);
}

}  // namespace tile
}  // namespace
}  // namespace permllm::cpu
