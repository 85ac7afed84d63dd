// The machine instructions of csrc/cuda/device.h on an emulated block.
#pragma once

#include "emulated_block.h"

namespace permllm::cuda {

using Where = std::source_location;

inline void sync_block(const Where& where = Where::current()) {
  if (emulator::leaves_out("sync_block", where)) return;
  emulator::leave(emulator::Fibre::kAtBlock);
}

inline void sync_warp(const Where& where = Where::current()) {
  if (emulator::leaves_out("sync_warp", where)) return;
  emulator::at_warp(nullptr, nullptr);
}

inline void copy_async_16(void* shared, const void* global, bool valid = true) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
    emulator::fail("unaligned copy");
  }
  std::memset(shared, 0xff, 16);
  emulator::block->current->open.push_back(
      {static_cast<unsigned char*>(shared),
       valid ? static_cast<const unsigned char*>(global) : nullptr});
}

inline void commit_copies() {
  emulator::Fibre& fibre = *emulator::block->current;
  fibre.committed.push_back(std::move(fibre.open));
  fibre.open.clear();
}

template <int kPending>
inline void wait_copies(const Where& where = Where::current()) {
  if (emulator::leaves_out("wait_copies", where)) return;
  auto& committed = emulator::block->current->committed;
  for (; committed.size() > kPending; committed.pop_front()) {
    for (const emulator::Copy& copy : committed.front()) {
      if (copy.source == nullptr) {
        std::memset(copy.target, 0, 16);
      } else {
        std::memcpy(copy.target, copy.source, 16);
      }
    }
  }
}

struct MatrixOperands {
  uint32_t* result;
  const void* row;
};

// Lane 4 r + c gets elements 2 c and 2 c + 1 of row r of each matrix.
inline void load_matrices(uint32_t (&result)[4], const void* row) {
  MatrixOperands own{result, row};
  emulator::at_warp(
      [](void* const* lanes) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          unsigned banks = 0;
          for (int r = 0; r < 8; ++r) {
            const void* start = static_cast<const MatrixOperands*>(lanes[matrix * 8 + r])->row;
            banks |= 1u << (reinterpret_cast<uintptr_t>(start) / 16 % 8);
          }
          if (banks != 0xff) emulator::fail("rows of a matrix share banks");
          for (int lane = 0; lane < 32; ++lane) {
            const auto* source =
                static_cast<const MatrixOperands*>(lanes[matrix * 8 + lane / 4])->row;
            if (reinterpret_cast<uintptr_t>(source) % 16) emulator::fail("unaligned ldmatrix");
            std::memcpy(&static_cast<MatrixOperands*>(lanes[lane])->result[matrix],
                        static_cast<const unsigned char*>(source) + lane % 4 * 4, 4);
          }
        }
      },
      &own);
}

struct MultiplyOperands {
  float* sum;
  const uint32_t* a;
  const uint32_t* b;
  uint32_t metadata;
};

// mma.sp.m16n8k32 for 16-bit types, by the fragment layouts of the PTX manual. With lane 4 g + t:
// a[h + 2 c] holds the stored values 2 t and 2 t + 1, plus 8 c, of row g + 8 h: group t + 4 c;
// b[i] inputs 2 t and 2 t + 1, plus 8 i, of token g; sum[i] row g + 8 (i / 2), token 2 t + i % 2.
// Lanes t = 2 selector, 2 selector + 1 hold the metadata of inputs 0..15, 16..31: row g in the low
// half of the word, row g + 8 in the high half.
template <int kSelector, float (*kToFloat)(uint16_t)>
inline void multiply_emulated(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                              uint32_t metadata) {
  MultiplyOperands own{sum, a, b, metadata};
  emulator::at_warp(
      [](void* const* lanes) {
        const auto lane_of = [&](int lane) {
          return static_cast<const MultiplyOperands*>(lanes[lane]);
        };
        const auto half_of = [](uint32_t word, int half) {
          return static_cast<double>(kToFloat(static_cast<uint16_t>(word >> (16 * half))));
        };
        double weights[16][32] = {}, inputs[32][8];
        for (int g = 0; g < 8; ++g) {
          for (int t = 0; t < 4; ++t) {
            const MultiplyOperands* lane = lane_of(4 * g + t);
            for (int i = 0; i < 8; ++i) {
              inputs[2 * t + i % 2 + 8 * (i / 2)][g] = half_of(lane->b[i / 2], i % 2);
            }
            for (int h = 0; h < 2; ++h) {
              for (int c = 0; c < 2; ++c) {
                const int group = t + 4 * c;
                const uint32_t word = lane_of(4 * g + 2 * kSelector + group / 4)->metadata;
                const uint32_t nibble = word >> (16 * h + 4 * (group % 4)) & 15;
                if ((nibble & 3) >= nibble >> 2) emulator::fail("metadata is not ordered");
                const uint32_t pair = lane->a[h + 2 * c];
                weights[g + 8 * h][4 * group + (nibble & 3)] = half_of(pair, 0);
                weights[g + 8 * h][4 * group + (nibble >> 2)] = half_of(pair, 1);
              }
            }
          }
        }
        for (int g = 0; g < 8; ++g) {
          for (int t = 0; t < 4; ++t) {
            for (int i = 0; i < 4; ++i) {
              double dot = 0;
              for (int k = 0; k < 32; ++k) {
                dot += weights[g + 8 * (i / 2)][k] * inputs[k][2 * t + i % 2];
              }
              static_cast<MultiplyOperands*>(lanes[4 * g + t])->sum[i] += static_cast<float>(dot);
            }
          }
        }
      },
      &own);
}

inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline float float16_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

template <int kSelector>
inline void multiply_bfloat16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                              uint32_t metadata) {
  multiply_emulated<kSelector, bfloat16_to_float>(sum, a, b, metadata);
}
template <int kSelector>
inline void multiply_float16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                             uint32_t metadata) {
  multiply_emulated<kSelector, float16_to_float>(sum, a, b, metadata);
}

inline uint32_t and_xor(uint32_t word, uint32_t mask, uint32_t bits) {
  return (word & mask) ^ bits;
}

inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return result;
}

inline uint32_t multiply_add_bfloat16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int half = 0; half < 2; ++half) {
    const auto at = [&](uint32_t word) {
      return bfloat16_to_float(static_cast<uint16_t>(word >> (16 * half)));
    };
    const float value = at(a) * at(b) + at(c);
    result |= uint32_t{__bfloat16_as_ushort(__float2bfloat16_rn(value))} << (16 * half);
  }
  return result;
}

inline uint32_t add_float16x2(uint32_t a, uint32_t b) {
  uint32_t result = 0;
  for (int half = 0; half < 2; ++half) {
    const auto at = [&](uint32_t word) {
      return float16_to_float(static_cast<uint16_t>(word >> (16 * half)));
    };
    result |= uint32_t{__half_as_ushort(__float2half_rn(at(a) + at(b)))} << (16 * half);
  }
  return result;
}

}  // namespace permllm::cuda
