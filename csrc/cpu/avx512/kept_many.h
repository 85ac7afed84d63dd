// AVX-512 for many tokens whose inputs are brought to the kept values: places and values of some
// row groups are taken to a panel in the L1 cache, some blocks at a time, and meet tiles of tokens
// there.
//
// Products are added up in the order of few tokens (avx512/kept_few.h), so that results are the
// same.
#pragma once

#include <optional>

#include "cpu/memory/scratch.h"
#include "cpu/threads/phases.h"
// The vector code comes last.
#include "cpu/avx512/kept.h"

namespace permllm::cpu {
namespace {

template <class Products>
class KeptManyTokens {
  using Tuning = typename Products::Tuning;
  using BlockOf16 = GroupedBlock<typename Products::Value>;
  using Rows = KeptRows<typename Products::Value>;
  using Inputs = typename Products::Inputs;
  using Outputs = typename Products::Outputs;

  static_assert(Products::kSums == 1);
  static_assert(Tuning::kKeptPackedTokens <= Tuning::kPackedTokens, "there is memory for so many");
  static constexpr int kInputs = Products::kInputs;
  static constexpr int64_t kPanelGroups = Tuning::kKeptPanelGroups;

  // Of a part of a block.
  struct Part {
    PartVectors places, values;
  };
  static constexpr int64_t kChunkBlocks =
      Tuning::kKeptChunkBytes / static_cast<int64_t>(Rows::kParts * sizeof(Part));

  // Of some blocks.
  struct Taken {
    Part parts[kChunkBlocks][Rows::kParts];
  };

  struct Panel {
    Taken groups[kPanelGroups];
  };

 public:
  static constexpr int64_t kPreparedAlone = Tuning::kPreparedAlone;

  explicit KeptManyTokens(const LinearArguments& a)
      : arguments_(a),
        blocks_(ceil_div(a.k, kBlockInputs)),
        tiles_(a.m),
        x_(static_cast<__m512i*>(a.packed_x)),
        inputs_(a),
        outputs_(a, inputs_) {}

  int64_t elements() const { return arguments_.m * arguments_.k; }
  int64_t measures() const { return inputs_.measures(); }
  void measure(int64_t token) const { inputs_.measure(token); }
  int64_t packs() const { return ceil_div(blocks_, kChunkBlocks) * tiles_.count(); }
  int64_t groups() const { return ceil_div(arguments_.n, kGroupedRows); }

  // Packed x is [chunk][tile][block][vector][token].
  void pack(int64_t item) const {
    const auto [token, tokens] = tiles_.tile(item % tiles_.count());
    const int64_t first = item / tiles_.count() * kChunkBlocks, count = chunk_count(first);
    __m512i* target = tile_of(first, token);
    for (int64_t b = 0; b < count; ++b, target += kInputs * tokens) {
      for (int64_t t = 0; t < tokens; ++t) {
        __m512i vectors[kInputs];
        inputs_.load(token + t, first + b, vectors);
        for (int i = 0; i < kInputs; ++i) target[i * tokens + t] = vectors[i];
      }
    }
  }

  void run(int64_t begin, int64_t end) const {
    const int64_t bytes = kPanelGroups * arguments_.m * static_cast<int64_t>(sizeof(__m512i));
    auto* sums = static_cast<__m512i*>(thread_scratch(Scratch::kSums, bytes));
    auto& panel = *static_cast<Panel*>(thread_scratch(Scratch::kPanel, sizeof(Panel)));
    for (int64_t group = begin; group < end; group += kPanelGroups) {
      const int64_t groups = smaller(kPanelGroups, end - group);
      for (int64_t first = 0; first < blocks_; first += kChunkBlocks) {
        multiply_chunk(group, groups, first, panel, sums);
      }
      for (int64_t g = 0; g < groups; ++g) {
        add_strays(Rows(arguments_, group + g), sums + g * arguments_.m);
      }
      store(group, groups, sums);
    }
  }

 private:
  const BlockOf16* block_of(int64_t group, int64_t block) const {
    return static_cast<const BlockOf16*>(arguments_.packed) + group * blocks_ + block;
  }

  // Some blocks of a panel's row groups with all tokens. A tile's inputs, once in L1, meet all of
  // them.
  void multiply_chunk(int64_t group, int64_t groups, int64_t first, Panel& panel,
                      __m512i* sums) const {
    const int64_t count = chunk_count(first), share = ceil_div(count, tiles_.count());
    for (int64_t g = 0; g < groups; ++g) {
      take(Rows(arguments_, group + g), block_of(group + g, first), count, panel.groups[g]);
    }
    // The chunk after this one, or the first of the next panel.
    const bool last = first + count == blocks_;
    const BlockOf16* next = last ? block_of(group + groups, 0) : block_of(group, first + count);
    for (int64_t tile = 0, fetched = 0; tile < tiles_.count(); ++tile) {
      const auto [token, tokens] = tiles_.tile(tile);
      const int64_t to_fetch = smaller(count, fetched + share);
      for (int64_t g = 0; g < groups; ++g) {
        for (int64_t b = fetched; b < to_fetch; ++b) {
          prefetch<Tuning::kKeptHint, sizeof(BlockOf16)>(
              reinterpret_cast<const char*>(next + g * blocks_ + b));
        }
        multiply_tile(panel.groups[g], count, tile_of(first, token), tokens,
                      sums + g * arguments_.m + token, first == 0);
      }
      fetched = to_fetch;
    }
  }

  int64_t chunk_count(int64_t first) const { return smaller(kChunkBlocks, blocks_ - first); }

  __m512i* tile_of(int64_t first_block, int64_t token) const {
    return x_ + (first_block * arguments_.m + token * chunk_count(first_block)) * kInputs;
  }

  static void take(const Rows& rows, const BlockOf16* blocks, int64_t count, Taken& taken) {
    for (int64_t b = 0; b < count; ++b) {
      typename Rows::Block block(rows, blocks[b]);
      PERMLLM_UNROLL
      for (int i = 0; i < Rows::kParts; ++i) {
        Part& part = taken.parts[b][i];
        block.take_places(i, part.places);
        block.take_values(i, part.values);
      }
    }
  }

  template <int Tokens = kKeptTile>
  static void multiply_tile(const Taken& taken, int64_t count, const __m512i* x, int64_t tokens,
                            __m512i* sums, bool first) {
    if constexpr (Tokens > 1) {
      if (tokens < Tokens) {
        return multiply_tile<Tokens - 1>(taken, count, x, tokens, sums, first);
      }
    }
    multiply<Tokens>(taken, count, x, sums, first);
  }

  template <int Tokens>
  PERMLLM_APART static void multiply(const Taken& taken, int64_t blocks, const __m512i* x,
                                     __m512i* sums, bool first) {
    __m512i sum[Tokens];
    PERMLLM_UNROLL
    for (int t = 0; t < Tokens; ++t) sum[t] = first ? _mm512_setzero_si512() : sums[t];
    for (int64_t b = 0; b < blocks; ++b, x += kInputs * Tokens) {
      PERMLLM_UNROLL
      for (int part = 0; part < Rows::kParts; ++part) {
        const auto& [places, values] = taken.parts[b][part];
        PERMLLM_UNROLL
        for (int t = 0; t < Tokens; ++t) {
          const __m512i inputs = x[Rows::vector_of_x(part) * Tokens + t];
          PERMLLM_UNROLL
          for (int i = 0; i < kPartVectors; ++i) {
            sum[t] = Products::multiply_kept(sum[t], places[i], values[i], inputs);
          }
        }
      }
    }
    PERMLLM_UNROLL
    for (int t = 0; t < Tokens; ++t) sums[t] = sum[t];
  }

  void add_strays(const Rows& rows, __m512i* sums) const {
    rows.for_each_stray(arguments_.k, [&](int row, int64_t input, auto value) {
      const int64_t vector = input / (kBlockInputs / kInputs);
      const int64_t first = vector / kInputs / kChunkBlocks * kChunkBlocks;
      for (int64_t tile = 0; tile < tiles_.count(); ++tile) {
        const auto [token, tokens] = tiles_.tile(tile);
        const __m512i* x = tile_of(first, token) + (vector - first * kInputs) * tokens;
        for (int64_t t = 0; t < tokens; ++t) {
          sums[token + t] = add_stray<Products>(sums[token + t], row, input, value, x[t]);
        }
      }
    });
  }

  // Neighbouring outputs of a token are written one after the other.
  void store(int64_t first, int64_t groups, const __m512i* sums) const {
    std::optional<GroupedOutputs<Products>> outputs[kPanelGroups];
    for (int64_t g = 0; g < groups; ++g) {
      outputs[g].emplace(arguments_, outputs_, (first + g) * kGroupedRows);
    }
    for (int64_t t = 0; t < arguments_.m; ++t) {
      for (int64_t g = 0; g < groups; ++g) {
        const __m512i own[1] = {sums[g * arguments_.m + t]};
        outputs[g]->store(own, t);
      }
    }
  }

  LinearArguments arguments_;
  int64_t blocks_;
  KeptTiles tiles_;
  __m512i* x_;
  Inputs inputs_;
  Outputs outputs_;
};

// Any number of tokens, in parts of about the same size, whose inputs stay in the cache.
template <class Products>
void multiply_kept_many_tokens(const LinearArguments& a, Worker& worker) {
  const int64_t parts = ceil_div(a.m, Products::Tuning::kKeptPackedTokens);
  const int64_t tokens = ceil_div(a.m, parts * kKeptTile) * kKeptTile;
  for (int64_t first = 0; first < a.m; first += tokens) {
    const LinearArguments part = part_of(a, first, smaller(tokens, a.m - first));
    go_through(KeptManyTokens<Products>(part), part.last, worker);
  }
}

}  // namespace
}  // namespace permllm::cpu
