#include "cpu/experts/routing.h"

#include <algorithm>

#include "cpu/memory/scratch.h"

namespace permllm::cpu {

Routing route(const int32_t* ids, const float* weights, int64_t tokens, int64_t choices,
              int64_t experts) {
  const int64_t most = tokens * choices;
  // The ends of the experts stand one place further than they are counted to, twice: they become
  // the firsts of the next, and move while the pairs are sorted.
  const int64_t bytes = (experts + 2) * sizeof(int64_t) + most * 3 * sizeof(int32_t);
  auto* first = reinterpret_cast<int64_t*>(scratch_of<char>(Scratch::kRouting, bytes));
  auto* expert = reinterpret_cast<int32_t*>(first + experts + 2);
  auto* token = expert + most;
  auto* weight = reinterpret_cast<float*>(token + most);
  std::fill_n(first, experts + 2, 0);
  for (int64_t i = 0; i < most; ++i) {
    if (ids[i] >= 0) ++first[ids[i] + 2];
  }
  for (int64_t e = 2; e < experts + 2; ++e) first[e] += first[e - 1];
  for (int64_t i = 0; i < most; ++i) {
    if (ids[i] < 0) continue;
    const int64_t place = first[ids[i] + 1]++;
    expert[place] = ids[i];
    token[place] = static_cast<int32_t>(i / choices);
    weight[place] = weights[i];
  }
  return {experts, first[experts], first, expert, token, weight};
}

}  // namespace permllm::cpu
