// One step of a kernel's main loop: some rows x 128 inputs of the weight, in shared memory.
#pragma once

#include "device.h"
#include "format.h"

namespace permllm::cuda {

constexpr int kStepRows = 128;  // of most blocks
constexpr int kStepInputs = 128;
constexpr int kWarpRows = 32;  // of one 16-byte load of metadata per lane
constexpr int kUnit = 16;      // bytes of one copy

// `kRows` need not divide the rows that are padded to 128: those past the last are not copied.
template <class Value, int kRows = kStepRows>
struct WeightStage {
  static_assert(kRows % kWarpRows == 0);
  static constexpr int kUnitsPerRow = kStepInputs / 2 * int{sizeof(Value)} / kUnit;  // 8 or 4
  static constexpr int kValueBytes = kRows * kUnitsPerRow * kUnit;
  static constexpr int kMetadataBytes = kRows * kStepInputs / 8;
  static constexpr int kBytes = kValueBytes + kMetadataBytes;

  // Rows that ldmatrix reads together lie in different banks.
  static PERMLLM_HOST_DEVICE constexpr int value_offset(int row, int unit) {
    const int swizzled = unit ^ (row * kUnitsPerRow / 8 % kUnitsPerRow);
    return (row * kUnitsPerRow + swizzled) * kUnit;
  }

  // Each lane's metadata, warp rows by warp rows.
  static PERMLLM_HOST_DEVICE constexpr int metadata_offset(int warp_rows, int lane) {
    return kValueBytes + (warp_rows * 32 + lane) * kUnit;
  }

  // Starts the copies of the step that begins at `row` and `input`, multiples of kRows and 128.
  template <int kThreads>
  static PERMLLM_DEVICE void copy(unsigned char* stage, const void* values, const uint8_t* metadata,
                                  int64_t padded_rows, int64_t padded_inputs, int64_t row,
                                  int64_t input) {
    const int thread = threadIdx.x;
    const auto is_there = [&](int r) { return kStepRows % kRows == 0 || row + r < padded_rows; };
    const int64_t row_bytes = padded_inputs / 2 * sizeof(Value);
    const auto* source = static_cast<const unsigned char*>(values) + row * row_bytes +
                         input / 2 * static_cast<int64_t>(sizeof(Value));
    PERMLLM_UNROLL
    for (int i = 0; i < kRows * kUnitsPerRow / kThreads; ++i) {
      const int index = thread + i * kThreads;
      const int r = index / kUnitsPerRow;
      const int unit = index % kUnitsPerRow;
      if (!is_there(r)) continue;
      copy_async_16(stage + value_offset(r, unit), source + r * row_bytes + unit * kUnit);
    }
    static_assert(kThreads >= kRows, "one thread per 16 bytes of metadata");
    if (thread < kRows && is_there(thread)) {
      const int lane = thread % 32;
      const int warp_rows = thread / 32;
      copy_async_16(
          stage + metadata_offset(warp_rows, lane),
          metadata + metadata_of_lane(lane, row + warp_rows * kWarpRows, input, padded_rows));
    }
  }
};

}  // namespace permllm::cuda
