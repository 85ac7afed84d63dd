// A warp's part of one step: rows x tokens, by mma.sp.m16n8k32.
#pragma once

#include "element.h"
#include "weight_stage.h"

namespace permllm::cuda {

// Weights of 32 rows x 32 inputs as two mma.sp operands A: rows 0..15 and 16..31.
template <class Element>
PERMLLM_DEVICE void load_weights(uint32_t (&a)[2][4], const unsigned char* stage, uint16_t /*type*/,
                                 int first_row, int quarter, int lane) {
  PERMLLM_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + half * 16 + lane % 16;
    const int unit = quarter * 2 + lane / 16;
    load_matrices(a[half], stage + WeightStage<uint16_t>::value_offset(row, unit));
  }
}

template <class Element>
PERMLLM_DEVICE void load_weights(uint32_t (&a)[2][4], const unsigned char* stage, int8_t /*type*/,
                                 int first_row, int quarter, int lane) {
  uint32_t bytes[4];  // of rows 0..7, 8..15, 16..23, 24..31
  load_matrices(bytes, stage + WeightStage<int8_t>::value_offset(first_row + lane, quarter));
  PERMLLM_UNROLL
  for (int eight = 0; eight < 4; ++eight) {
    uint32_t (&operand)[4] = a[eight / 2];
    operand[eight % 2] = Element::from_int8(pick_bytes(bytes[eight], 0, 0x4140));
    operand[eight % 2 + 2] = Element::from_int8(pick_bytes(bytes[eight], 0, 0x4342));
  }
}

// kRowTiles x 32 rows of a stage by kTokenTiles x 8 tokens.
template <class Element, class Value, int kRowTiles, int kTokenTiles>
struct WarpTile {
  // [32 rows][half of them][8 tokens][fragment]
  float sums[kRowTiles][2][kTokenTiles][4];

  PERMLLM_DEVICE void clear() {
    PERMLLM_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      PERMLLM_UNROLL
      for (int half = 0; half < 2; ++half) {
        PERMLLM_UNROLL
        for (int t = 0; t < kTokenTiles; ++t) {
          PERMLLM_UNROLL
          for (int i = 0; i < 4; ++i) sums[r][half][t][i] = 0.f;
        }
      }
    }
  }

  // Adds 128 inputs. `first_row` of the stage is a multiple of 32; `x(token, unit)` is the address
  // of 8 permuted inputs of a token of this warp.
  template <class Activations>
  PERMLLM_DEVICE void add_step(const unsigned char* stage, int first_row, int lane,
                               const Activations& x) {
    uint4 metadata[kRowTiles];
    PERMLLM_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      const int offset = WeightStage<Value>::metadata_offset(first_row / kWarpRows + r, lane);
      metadata[r] = *reinterpret_cast<const uint4*>(stage + offset);
    }
    PERMLLM_UNROLL
    for (int quarter = 0; quarter < 4; ++quarter) {
      uint32_t a[kRowTiles][2][4];
      uint32_t words[kRowTiles];
      PERMLLM_UNROLL
      for (int r = 0; r < kRowTiles; ++r) {
        load_weights<Element>(a[r], stage, Value{}, first_row + r * kWarpRows, quarter, lane);
        const uint4& m = metadata[r];
        words[r] = quarter == 0 ? m.x : quarter == 1 ? m.y : quarter == 2 ? m.z : m.w;
      }
      PERMLLM_UNROLL
      for (int t = 0; t < kTokenTiles; ++t) {
        uint32_t b[4];
        load_matrices(b, x(t * 8 + lane % 8, quarter * 4 + lane / 8));
        PERMLLM_UNROLL
        for (int r = 0; r < kRowTiles; ++r) {
          Element::template multiply<0>(sums[r][0][t], a[r][0], b, words[r]);
          Element::template multiply<1>(sums[r][1][t], a[r][1], b, words[r]);
        }
      }
    }
  }

  // Writes the sums to `tile` [tokens][pitch], at this warp's first row and token.
  PERMLLM_DEVICE void store(float* tile, int pitch, int first_row, int first_token,
                            int lane) const {
    PERMLLM_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      PERMLLM_UNROLL
      for (int half = 0; half < 2; ++half) {
        PERMLLM_UNROLL
        for (int t = 0; t < kTokenTiles; ++t) {
          PERMLLM_UNROLL
          for (int i = 0; i < 4; ++i) {
            const int row = first_row + r * 32 + half * 16 + lane / 4 + 8 * (i / 2);
            const int token = first_token + t * 8 + lane % 4 * 2 + i % 2;
            tile[token * pitch + row] = sums[r][half][t][i];
          }
        }
      }
    }
  }
};

}  // namespace permllm::cuda
