// Where kernels with vectors of any width find a row group: in packed blocks of some layout, or in
// the rows of a matrix.
//
// Both are a place in a weight, at the beginning of some block of a row group:
//   (a, group, block)   of the call `a`; blocks past a group's last are those of the next
//   place + blocks      further on in the same row group, as far as it reaches
//   prefetch<Hint>()    the cache lines of a block
//   multipliers()       of the rows of a block, where its values are in 4 bits
//
// Include after every other header: what follows is compiled for one instruction set.
#pragma once

#include <type_traits>

#include "cpu/vector/vector.h"

namespace permllm::cpu {
namespace {

template <class BlockType>
class BlocksOf {
 public:
  using Block = BlockType;

  template <class Real>
  BlocksOf(const LinearOf<Real>& a, int64_t group, int64_t block)
      : BlocksOf(static_cast<const Block*>(a.packed) + group * ceil_div(a.k, kBlockInputs) +
                 block) {}

  BlocksOf operator+(int64_t blocks) const { return BlocksOf(block_ + blocks); }
  const Block& operator*() const { return *block_; }

  template <int kHint>
  void prefetch() const {
    PERMLLM_UNROLL
    for (unsigned line = 0; line < sizeof(Block); line += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(block_) + line, 0, kHint);
    }
  }

 private:
  explicit BlocksOf(const Block* block) : block_(block) {}

  const Block* block_;
};

template <class BlockType>
class MultipliedBlocksOf : public BlocksOf<BlockType> {
  using Blocks = BlocksOf<BlockType>;

 public:
  template <class Real>
  MultipliedBlocksOf(const LinearOf<Real>& a, int64_t group, int64_t block)
      : Blocks(a, group, block),
        multipliers_(a.behind.multipliers + (group * ceil_div(a.k, kBlockInputs) + block) * kRows) {
  }

  MultipliedBlocksOf operator+(int64_t blocks) const {
    return MultipliedBlocksOf(Blocks::operator+(blocks), multipliers_ + blocks * kRows);
  }
  const uint8_t* multipliers() const { return multipliers_; }

 private:
  MultipliedBlocksOf(Blocks blocks, const uint8_t* multipliers)
      : Blocks(blocks), multipliers_(multipliers) {}

  const uint8_t* multipliers_;
};

template <class Value, int Of>
using BlocksInLanes =
    std::conditional_t<std::is_same_v<Value, int4>, MultipliedBlocksOf<LaneBlock<Value, Of>>,
                       BlocksOf<LaneBlock<Value, Of>>>;

template <class Value>
using PackedBlocks = BlocksOf<Block<kRows, Value>>;

// Values as in the checkpoint, [n, k], where n is a multiple of kRows and k of kBlockInputs.
template <class Value>
class MatrixRows {
 public:
  template <class Real>
  MatrixRows(const LinearOf<Real>& a, int64_t group, int64_t block) : k_(a.k) {
    const int64_t blocks = a.k / kBlockInputs;
    const int64_t row = (group + block / blocks) * kRows;
    first_ = static_cast<const Value*>(a.packed) + row * a.k + block % blocks * kBlockInputs;
  }

  MatrixRows operator+(int64_t blocks) const {
    MatrixRows further = *this;
    further.first_ += blocks * kBlockInputs;
    return further;
  }

  const Value* row(int r) const { return first_ + r * k_; }

  template <int kHint>
  void prefetch() const {
    PERMLLM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      PERMLLM_UNROLL
      for (unsigned line = 0; line < kBlockInputs * sizeof(Value); line += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(row(r)) + line, 0, kHint);
      }
    }
  }

 private:
  const Value* first_;
  int64_t k_;
};

}  // namespace
}  // namespace permllm::cpu
