#include "cpu/experts/experts.h"

#include <algorithm>

#include "cpu/experts/steps.h"
#include "cpu/isa.h"
#include "cpu/linear.h"
#include "cpu/memory/scratch.h"
#include "cpu/packing/pack.h"
#include "cpu/threads/region.h"
#include "cpu/tuning.h"

namespace permllm::cpu {
namespace {

PackedLayout layout_of(const StackedLinear& linear, int64_t expert) {
  const int64_t* header = linear.headers + expert * StackedLinear::kHeader;
  return {static_cast<Isa>(header[header::kIsa]), static_cast<ValueType>(header[header::kValues]),
          linear.n, linear.k, header[header::kStrays]};
}

// The experts of some consecutive pairs, whose rows are in memory at once.
template <class Real>
class Experts {
 public:
  Experts(const ExpertsOf<Real>& a, const Routing& routing)
      : a_(a), routing_(routing), steps_(steps_of<Real>(layout_of(a.down, 0).isa)) {
    const int64_t at_once = std::min(routing.pairs, CommonTuning::kExpertPairs);
    // One token that nothing permutes is the input of all its experts where it stands.
    if (a.tokens > 1 || a.gate_up.gather != nullptr) {
      inputs_ = scratch_of<Real>(Scratch::kGathered, at_once * a.gate_up.k);
    }
    gate_up_ = scratch_of<Real>(Scratch::kGateUp, at_once * a.gate_up.n);
    gated_ = scratch_of<Real>(Scratch::kGated, at_once * a.down.k);
    outputs_ = scratch_of<Real>(Scratch::kExpertOutputs, at_once * a.down.n);
    sums_ = scratch_of<float>(Scratch::kTokenSums, a.tokens * a.down.n);
    InputMemory memory;
    for (int64_t expert = 0; expert < routing.experts; ++expert) {
      if (!routing.chosen(expert)) continue;
      const int64_t m = std::min(at_once, routing.first[expert + 1] - routing.first[expert]);
      for (const StackedLinear* linear : {&a.gate_up, &a.down}) {
        const PackedLayout layout = layout_of(*linear, expert);
        const InputMemory own = input_memory<Real>(layout.isa, layout.type, m, layout.k);
        memory = {std::max(memory.bytes, own.bytes), std::max(memory.scales, own.scales)};
      }
    }
    packed_x_ = scratch_of<char>(Scratch::kActivations, memory.bytes);
    token_scales_ = scratch_of<float>(Scratch::kTokenScales, memory.scales);
  }

  void run(Worker& worker) const {
    const int64_t columns = a_.down.n;
    worker.each(a_.tokens,
                [&](int64_t token) { std::fill_n(sums_ + token * columns, columns, 0.0f); });
    for (int64_t first = 0; first < routing_.pairs; first += CommonTuning::kExpertPairs) {
      const int64_t last = std::min(first + CommonTuning::kExpertPairs, routing_.pairs);
      if (inputs_ != nullptr) gather(first, last, worker);
      multiply_each(a_.gate_up, first, last, inputs_, gate_up_, worker);
      worker.each(last - first, [&](int64_t row) {
        const int32_t* gather = row_of(a_.down.gather, a_.down.k, first + row);
        steps_.activate[static_cast<int>(a_.activation)](gate_up_ + row * a_.gate_up.n, a_.down.k,
                                                         gather, gated_ + row * a_.down.k);
      });
      multiply_each(a_.down, first, last, gated_, outputs_, worker);
      add(first, last, worker);
    }
    worker.each(a_.tokens, [&](int64_t token) {
      steps_.round(sums_ + token * columns, columns, a_.y + token * columns);
    });
  }

 private:
  // Of an array with a row for every expert, that of a pair's.
  const int32_t* row_of(const int32_t* rows, int64_t columns, int64_t pair) const {
    return rows == nullptr ? nullptr : rows + routing_.expert[pair] * columns;
  }

  void gather(int64_t first, int64_t last, Worker& worker) const {
    const int64_t k = a_.gate_up.k;
    worker.each(last - first, [&](int64_t row) {
      const Real* source = a_.x + routing_.token[first + row] * a_.x_stride;
      const int32_t* gather = row_of(a_.gate_up.gather, k, first + row);
      Real* target = inputs_ + row * k;
      if (gather == nullptr) {
        std::copy_n(source, k, target);
      } else {
        for (int64_t i = 0; i < k; ++i) target[i] = source[gather[i]];
      }
    });
  }

  // Multiplies the rows of each expert with its weight. Without inputs, all are the one token.
  void multiply_each(const StackedLinear& linear, int64_t first, int64_t last, const Real* inputs,
                     Real* outputs, Worker& worker) const {
    for (int64_t begin = first; begin < last;) {
      const int64_t expert = routing_.expert[begin];
      const int64_t end = std::min(last, routing_.first[expert + 1]);
      const PackedLayout layout = layout_of(linear, expert);
      const int64_t* header = linear.headers + expert * StackedLinear::kHeader;
      LinearOf<Real> own{};
      own.x = inputs == nullptr ? a_.x : inputs + (begin - first) * linear.k;
      own.x_stride = inputs == nullptr ? 0 : linear.k;
      own.m = end - begin;
      own.packed = linear.packed + header[header::kSize];
      own.n = linear.n;
      own.k = linear.k;
      own.y = outputs + (begin - first) * linear.n;
      if (linear.scale != nullptr) own.scale = linear.scale + expert * linear.n;
      own.behind = layout.behind(own.packed);
      own.packed_x = packed_x_;
      own.token_scales = token_scales_;
      own.last = false;  // what follows waits for it
      multiply(layout.isa, layout.type, own, worker);
      begin = end;
    }
  }

  // Adds the outputs of pairs to the sums of their tokens, some columns of all at a time.
  void add(int64_t first, int64_t last, Worker& worker) const {
    constexpr int64_t kColumns = CommonTuning::kExpertColumns;
    worker.each(ceil_div(a_.down.n, kColumns), [&](int64_t part) {
      const int64_t column = part * kColumns, count = std::min(kColumns, a_.down.n - column);
      for (int64_t pair = first; pair < last; ++pair) {
        steps_.add(outputs_ + (pair - first) * a_.down.n + column, count, routing_.weight[pair],
                   sums_ + routing_.token[pair] * a_.down.n + column);
      }
    });
  }

  const ExpertsOf<Real>& a_;
  const Routing& routing_;
  const ExpertSteps<Real> steps_;
  Real* inputs_ = nullptr;  // [pairs, gate_up.k]
  Real* gate_up_;           // [pairs, gate_up.n]
  Real* gated_;             // [pairs, down.k]
  Real* outputs_;           // [pairs, down.n]
  float* sums_;             // [tokens, down.n]
  void* packed_x_;
  float* token_scales_;
};

}  // namespace

template <class Real>
void multiply_experts(const ExpertsOf<Real>& a, const Routing& routing) {
  const Experts<Real> experts(a, routing);
  in_region([&](Worker& worker) { experts.run(worker); });
}

template void multiply_experts(const ExpertsOf<bf16>&, const Routing&);
template void multiply_experts(const ExpertsOf<fp16>&, const Routing&);
template void multiply_experts(const ExpertsOf<float>&, const Routing&);

}  // namespace permllm::cpu
