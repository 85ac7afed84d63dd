// Outputs of few tokens, kept until several lines of y can be written. Include after amx/target.h.
//
// y is in no cache, and a pair of row groups fills one line of it for every token: so many lines,
// each far from the others, take memory longer than lines that follow each other.
#pragma once

#include "cpu/amx/pack.h"

namespace permllm::cpu {
namespace {

class OutputPanel {
 public:
  explicit OutputPanel(const LinearArguments& a) : a_(a) {}
  ~OutputPanel() { write(); }
  OutputPanel(const OutputPanel&) = delete;
  OutputPanel& operator=(const OutputPanel&) = delete;

  // Where the 32 outputs from `row` on go. Those before are written where the panel is full, or
  // where `row` is not the next one.
  OutputColumns columns(int64_t row) {
    if (row != first_ + collected_ || collected_ == kRows) {
      write();
      first_ = row;
    }
    bf16* target = rows_[0] + collected_;
    collected_ += kPairRows;
    return OutputColumns(a_, row, target, kRows);
  }

 private:
  static constexpr int64_t kPairRows = kAmxGroups * kAmxRows;
  static constexpr int64_t kRows = AmxTuning::kWrittenPairs * kPairRows;

  void write() {
    for (int64_t token = 0; token < a_.token(a_.m); ++token) {
      bf16* y = a_.y + token * a_.n + first_;
      for (int64_t row = 0; row < collected_; row += kPairRows) {
        const __m512i outputs = _mm512_load_si512(rows_[token] + row);
        _mm512_mask_storeu_epi16(y + row, first_lanes(a_.n - first_ - row), outputs);
      }
    }
    collected_ = 0;
  }

  const LinearArguments& a_;
  alignas(64) bf16 rows_[AmxTuning::kFewTokens][kRows];
  int64_t first_ = 0, collected_ = 0;
};

}  // namespace
}  // namespace permllm::cpu
