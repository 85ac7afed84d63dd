// Sorts pairs of a token and one of its experts by expert, in one block of threads.
//
// Which pair of an expert comes first depends on which thread does. No result does: pairs are
// multiplied as tokens are, each by itself, and added in the order of a token's choices.
#pragma once

#include "device.h"
#include "experts.h"

namespace permllm::cuda {

constexpr int kRouteThreads = 512;
constexpr int kIdsAtOnce = 4;  // of a thread, whose loads are on their way together
constexpr int kExpertsOfThread = kMostExperts / kRouteThreads;
constexpr int kRouteSharedBytes = (kMostExperts + 2 * kRouteThreads) * int{sizeof(int)};

// Sums of both numbers over this thread and those before it.
PERMLLM_DEVICE void add_threads_before(int* pairs, int* blocks) {
  const int thread = threadIdx.x;
  PERMLLM_LOOP
  for (int distance = 1; distance < kRouteThreads; distance *= 2) {
    const bool adds = thread >= distance;
    const int more_pairs = adds ? pairs[thread - distance] : 0;
    const int more_blocks = adds ? blocks[thread - distance] : 0;
    sync_block();  // everyone has read
    pairs[thread] += more_pairs;
    blocks[thread] += more_blocks;
    sync_block();  // everyone has written
  }
}

// Calls visit(pair, its expert) for all pairs of this thread.
template <class Visit>
PERMLLM_DEVICE void for_each_pair(const int* ids, int pairs, const Visit& visit) {
  PERMLLM_LOOP
  for (int first = threadIdx.x; first < pairs; first += kRouteThreads * kIdsAtOnce) {
    int experts[kIdsAtOnce];
    PERMLLM_UNROLL
    for (int i = 0; i < kIdsAtOnce; ++i) {
      const int pair = first + i * kRouteThreads;
      experts[i] = pair < pairs ? ids[pair] : -1;
    }
    PERMLLM_UNROLL
    for (int i = 0; i < kIdsAtOnce; ++i) {
      const int pair = first + i * kRouteThreads;
      if (pair < pairs) visit(pair, experts[i]);
    }
  }
}

PERMLLM_DEVICE void route_body(const ExpertsArguments& arguments, const ExpertsPlan& plan,
                               unsigned char* shared) {
  // Of an expert; then where its next pair goes.
  int* const counts = reinterpret_cast<int*>(shared);
  int* const pairs_before = counts + kMostExperts;
  int* const blocks_before = pairs_before + kRouteThreads;
  const int thread = threadIdx.x;
  const int block_pairs = plan.block_pairs;
  const PairTables& tables = arguments.tables;
  const auto is_here = [&](int expert) { return expert >= 0 && expert < arguments.experts; };

  wait_for_previous_kernel();
  allow_next_kernel();
  for (int expert = thread; expert < kMostExperts; expert += kRouteThreads) counts[expert] = 0;
  sync_block();  // counts are zeros
  for_each_pair(arguments.ids, plan.pairs, [&](int, int expert) {
    if (is_here(expert)) add_shared(counts + expert, 1);
  });
  sync_block();  // all are counted

  int own_pairs = 0, own_blocks = 0;
  PERMLLM_UNROLL
  for (int i = 0; i < kExpertsOfThread; ++i) {
    const int count = counts[thread * kExpertsOfThread + i];
    own_pairs += count;
    own_blocks += (count + block_pairs - 1) / block_pairs;
  }
  pairs_before[thread] = own_pairs;
  blocks_before[thread] = own_blocks;
  sync_block();  // those of all threads are there
  add_threads_before(pairs_before, blocks_before);

  int first = pairs_before[thread] - own_pairs;
  int block = blocks_before[thread] - own_blocks;
  PERMLLM_UNROLL
  for (int i = 0; i < kExpertsOfThread; ++i) {
    const int expert = thread * kExpertsOfThread + i;
    const int count = counts[expert];
    for (int done = 0; done < count; done += block_pairs) {
      const int rest = count - done;
      tables.blocks[block++] = {expert, first + done, rest < block_pairs ? rest : block_pairs};
    }
    counts[expert] = first;
    first += count;
  }
  for (int b = blocks_before[kRouteThreads - 1] + thread; b < plan.blocks; b += kRouteThreads) {
    tables.blocks[b] = {0, 0, 0};
  }
  for (int s = pairs_before[kRouteThreads - 1] + thread; s < plan.pairs; s += kRouteThreads) {
    tables.expert[s] = -1;
  }
  sync_block();  // where each expert's pairs go
  for_each_pair(arguments.ids, plan.pairs, [&](int pair, int expert) {
    const bool here = is_here(expert);
    const int place = here ? add_shared(counts + expert, 1) : -1;
    tables.place[pair] = place;
    if (!here) return;
    tables.token[place] = pair / arguments.choices;
    tables.expert[place] = expert;
  });
}

}  // namespace permllm::cuda
