// Which tokens go to which expert: pairs of a token and one of its experts, expert by expert.
#pragma once

#include <cstdint>

namespace permllm::cpu {

struct Routing {
  int64_t experts = 0;
  int64_t pairs = 0;
  const int64_t* first = nullptr;   // [experts + 1], the first pair of every expert
  const int32_t* expert = nullptr;  // [pairs], ascending
  const int32_t* token = nullptr;   // [pairs], ascending within an expert
  const float* weight = nullptr;    // [pairs], of the router

  bool chosen(int64_t index) const { return first[index] < first[index + 1]; }
};

// Sorts what a router chose for every token: ids and weights [tokens, choices]. The result lies in
// scratch of this thread, and is valid until it routes again. Ids below 0 are experts of other
// processes, of which there are no pairs here; the others must be less than `experts`.
Routing route(const int32_t* ids, const float* weights, int64_t tokens, int64_t choices,
              int64_t experts);

}  // namespace permllm::cpu
