// How vectors of tokens are cut into blocks that a register-blocked kernel takes at a time.
#pragma once

#include <cstdint>
#include <type_traits>

namespace permllm::cpu {
namespace {

template <int Count>
using BlockOf = std::integral_constant<int, Count>;

// As many as `Most`, or one less where a single vector would be left, whose products need a
// broadcast each.
template <int Most>
constexpr int64_t block_size(int64_t left) {
  return left == Most + 1 && Most > 1 ? Most - 1 : left < Most ? left : Most;
}

// body(first, BlockOf<count>()) for every block.
template <int Most, class Body>
inline void for_each_block(int64_t vectors, Body body) {
  for (int64_t first = 0; first < vectors;) {
    const int64_t count = block_size<Most>(vectors - first);
    const auto choose = [&](auto self, auto largest) {
      if constexpr (largest > 1) {
        if (count < largest) return self(self, BlockOf<largest - 1>());
      }
      body(first, largest);
    };
    choose(choose, BlockOf<Most>());
    first += count;
  }
}

static_assert(block_size<3>(7) == 3 && block_size<3>(4) == 2 && block_size<3>(1) == 1);

}  // namespace
}  // namespace permllm::cpu
