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

// body(BlockOf<count>()), for 1..Most.
template <int Most, class Body>
inline void with_block_of(int64_t count, Body body) {
  if constexpr (Most > 1) {
    if (count < Most) return with_block_of<Most - 1>(count, body);
  }
  body(BlockOf<Most>());
}

// body(first, BlockOf<count>()) for every block.
template <int Most, class Body>
inline void for_each_block(int64_t vectors, Body body) {
  for (int64_t first = 0; first < vectors;) {
    const int64_t count = block_size<Most>(vectors - first);
    with_block_of<Most>(count, [&](auto known) { body(first, known); });
    first += count;
  }
}

// body(first, count) for parts of at most `most`, whose counts differ by one at most.
template <class Body>
inline void for_each_even_part(int64_t all, int64_t most, Body body) {
  const int64_t parts = (all + most - 1) / most;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = all * part / parts;
    body(first, all * (part + 1) / parts - first);
  }
}

static_assert(block_size<3>(7) == 3 && block_size<3>(4) == 2 && block_size<3>(1) == 1);

}  // namespace
}  // namespace permllm::cpu
