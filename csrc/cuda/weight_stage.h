// One step of the main loop: 128 rows x 128 inputs of the weight, in shared memory.
#pragma once

#include "device.h"
#include "format.h"

namespace permllm::cuda {

constexpr int kStepRows = 128;  // of a block
constexpr int kStepInputs = 128;
constexpr int kWarpRows = 32;  // of one 16-byte load of metadata per lane
constexpr int kUnit = 16;      // bytes of one copy
constexpr int kMmaThreads = 128;

template <class Value>
struct WeightStage {
  static constexpr int kUnitsPerRow = kStepInputs / 2 * int{sizeof(Value)} / kUnit;  // 8 or 4
  static constexpr int kValueBytes = kStepRows * kUnitsPerRow * kUnit;
  static constexpr int kBytes = kValueBytes + kStepRows * kStepInputs / 8;

  // Rows that ldmatrix reads together lie in different banks.
  static PERMLLM_HOST_DEVICE constexpr int value_offset(int row, int unit) {
    const int swizzled = unit ^ (row * kUnitsPerRow / 8 % kUnitsPerRow);
    return (row * kUnitsPerRow + swizzled) * kUnit;
  }

  // Each lane's metadata, warp rows by warp rows.
  static PERMLLM_HOST_DEVICE constexpr int metadata_offset(int warp_rows, int lane) {
    return kValueBytes + (warp_rows * 32 + lane) * kUnit;
  }

  // Starts the copies of the step that begins at `row` and `input`, multiples of 128.
  static PERMLLM_DEVICE void copy(unsigned char* stage, const void* values, const uint8_t* metadata,
                                  int64_t padded_rows, int64_t padded_inputs, int64_t row,
                                  int64_t input) {
    const int thread = threadIdx.x;
    const int64_t row_bytes = padded_inputs / 2 * sizeof(Value);
    const auto* source = static_cast<const unsigned char*>(values) + row * row_bytes +
                         input / 2 * static_cast<int64_t>(sizeof(Value));
    PERMLLM_UNROLL
    for (int i = 0; i < kStepRows * kUnitsPerRow / kMmaThreads; ++i) {
      const int index = thread + i * kMmaThreads;
      const int r = index / kUnitsPerRow;
      const int unit = index % kUnitsPerRow;
      copy_async_16(stage + value_offset(r, unit), source + r * row_bytes + unit * kUnit);
    }
    static_assert(kMmaThreads == kStepRows, "one thread per 16 bytes of metadata");
    const int lane = thread % 32;
    const int warp_rows = thread / 32;
    copy_async_16(
        stage + metadata_offset(warp_rows, lane),
        metadata + metadata_of_lane(lane, row + warp_rows * kWarpRows, input, padded_rows));
  }
};

}  // namespace permllm::cuda
