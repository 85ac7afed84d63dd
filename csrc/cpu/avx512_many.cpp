// AVX-512 with BF16 for many tokens: rows are expanded once to a dense panel in the cache, and a
// register-blocked kernel multiplies it with vectors of 16 tokens.
//
// A lane is a token. x is packed to pairs of inputs x 16 tokens, so that a pair of weights, read
// from the row-major panel and broadcast, meets 16 tokens in one instruction: expanding needs no
// shuffle beyond vpexpandw, and only the sums are transposed, once per output.
#include "kernels.h"
#include "scratch.h"
#include "threads.h"
// The vector code comes last.
#include "avx512.h"

namespace permllm::cpu {
namespace {

constexpr int kChunkInputs = tuning::kChunkBlocks * kBlockInputs;
constexpr int kBlockPairs = kBlockInputs / 2;
constexpr int kPairElements = 2 * kLanes;  // one pair of inputs of 16 tokens

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// One block of tokens and the packed activations: [chunk][token vector][pair][16 tokens][2].
struct Tokens {
  const bf16* x;
  int64_t vectors;
  int64_t input_blocks;

  const bf16* chunk(int64_t first_block) const {
    return x + first_block * kBlockInputs * vectors * kLanes;
  }
};

// Packs 16 tokens (or the fewer that are left) of one input block.
void pack_block(const LinearArguments& a, int64_t vector, int64_t block, bf16* target) {
  for (int half = 0; half < 2; ++half) {
    const int64_t first = block * kBlockInputs + half * 32;
    const int64_t inputs = smaller(a.k - first, 32);
    const auto mask =
        inputs <= 0 ? __mmask32{0} : static_cast<__mmask32>(0xffffffff >> (32 - inputs));
    __m512i pairs[kLanes];
    PERMLLM_UNROLL
    for (int t = 0; t < kLanes; ++t) {
      const int64_t token = vector * kLanes + t;
      pairs[t] = token < a.m ? _mm512_maskz_loadu_epi16(mask, a.x + token * a.x_stride + first)
                             : _mm512_setzero_si512();
    }
    transpose(pairs);
    PERMLLM_UNROLL
    for (int p = 0; p < 16; ++p) {
      _mm512_store_si512(target + (half * 16 + p) * kPairElements, pairs[p]);
    }
  }
}

Tokens pack_activations(const LinearArguments& a) {
  const int64_t vectors = ceil_div(a.m, kLanes);
  const int64_t blocks = ceil_div(a.k, kBlockInputs);
  auto* x = static_cast<bf16*>(thread_scratch(
      Scratch::kActivations, vectors * kLanes * blocks * kBlockInputs * sizeof(bf16)));
  const Tokens tokens{x, vectors, blocks};
  const auto pack = [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * tuning::kChunkBlocks;
      const int64_t count = smaller(tuning::kChunkBlocks, blocks - first);
      bf16* target = x + first * kBlockInputs * vectors * kLanes;
      for (int64_t vector = 0; vector < vectors; ++vector) {
        for (int64_t b = 0; b < count; ++b, target += kBlockInputs * kLanes) {
          pack_block(a, vector, first + b, target);
        }
      }
    }
  };
  // A second parallel region costs more than packing where that is a small part of the call: on a
  // busy machine every region waits for its last thread.
  const int64_t chunks = ceil_div(blocks, tuning::kChunkBlocks);
  if (a.n >= tuning::kSerialPackRows * thread_count() || a.m * a.k <= tuning::kSerialPackElements) {
    pack(0, chunks);
  } else {
    parallel_for(chunks, pack);
  }
  return tokens;
}

// `count` blocks of one row group to panel[row][kChunkInputs].
void expand(const Rows8* block, int64_t count, bf16* panel) {
  for (int64_t b = 0; b < count; ++b, ++block, panel += kBlockInputs) {
    PERMLLM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      _mm512_store_si512(panel + r * kChunkInputs, expand_low(*block, r));
      _mm512_store_si512(panel + r * kChunkInputs + 32, expand_high(*block, r));
    }
  }
}

inline __m512i broadcast_pair(const bf16* pair) {
  return _mm512_set1_epi32(*reinterpret_cast<const int __attribute__((may_alias))*>(pair));
}

// What is fetched while a step multiplies: the blocks of a later step (unless null), and a share of
// the next chunk of x, which all of this chunk's steps together fetch into L2.
struct Fetches {
  const Rows8* blocks;
  const char* x;
};

// Bytes of x to fetch with every block of a call that multiplies up to three vectors.
constexpr int kFetchedX =
    3 * kChunkInputs * kLanes * sizeof(bf16) / (tuning::kPanelGroups * tuning::kChunkBlocks);

// sums[row][token] (rows `stride` floats apart) += panel[row][pair] * x[vector][pair][token].
template <int Vectors>
void multiply(const bf16* panel, const bf16* x, int64_t blocks, float* sums, int64_t stride,
              bool first, Fetches& fetches) {
  __m512 sum[kRows][Vectors];
  PERMLLM_UNROLL
  for (int r = 0; r < kRows; ++r) {
    PERMLLM_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      sum[r][v] = first ? _mm512_setzero_ps() : _mm512_load_ps(sums + r * stride + v * kLanes);
    }
  }
  const int64_t vector_stride = blocks * kBlockPairs * kPairElements;
  for (int64_t b = 0; b < blocks; ++b) {
    if (fetches.blocks != nullptr) {
      prefetch<tuning::kManyHint, sizeof(Rows8)>(reinterpret_cast<const char*>(fetches.blocks + b));
    }
    prefetch<tuning::kManyHintX, kFetchedX>(fetches.x);
    fetches.x += kFetchedX;
    for (int p = 0; p < kBlockPairs; ++p, panel += 2, x += kPairElements) {
      __m512i tokens[Vectors];
      PERMLLM_UNROLL
      for (int v = 0; v < Vectors; ++v) tokens[v] = _mm512_load_si512(x + v * vector_stride);
      PERMLLM_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const __m512i weights = broadcast_pair(panel + r * kChunkInputs);
        PERMLLM_UNROLL
        for (int v = 0; v < Vectors; ++v) sum[r][v] = dot_pairs(sum[r][v], weights, tokens[v]);
      }
    }
  }
  PERMLLM_UNROLL
  for (int r = 0; r < kRows; ++r) {
    PERMLLM_UNROLL
    for (int v = 0; v < Vectors; ++v) _mm512_store_ps(sums + r * stride + v * kLanes, sum[r][v]);
  }
}

// All token vectors, three at a time and the rest by twos: 24 or 16 accumulators.
void multiply_all(const bf16* panel, const Tokens& tokens, const bf16* x, int64_t blocks,
                  float* sums, bool first, Fetches fetches) {
  const int64_t stride = tokens.vectors * kLanes;
  int64_t left = tokens.vectors;
  while (left > 0) {
    const int64_t take = left == 1 ? 1 : left == 2 || left == 4 ? 2 : 3;
    (take == 1   ? multiply<1>
     : take == 2 ? multiply<2>
                 : multiply<3>)(panel, x, blocks, sums, stride, first, fetches);
    fetches.blocks = nullptr;
    x += take * blocks * kBlockPairs * kPairElements;
    sums += take * kLanes;
    left -= take;
  }
}

inline __m512 load_bias(const bf16* bias, __mmask16 mask) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, bias));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

// 32 rows x 16 tokens of sums to y, a cache line per token. `rows` of them exist.
void store(const LinearArguments& a, const float* sums, int64_t stride, int64_t row, int64_t rows,
           int64_t token) {
  __m512i low[16], high[16];
  PERMLLM_UNROLL
  for (int i = 0; i < 16; ++i) low[i] = _mm512_load_si512(sums + i * stride);
  if (rows > 16) {
    PERMLLM_UNROLL
    for (int i = 0; i < 16; ++i) high[i] = _mm512_load_si512(sums + (16 + i) * stride);
  } else {
    PERMLLM_UNROLL
    for (int i = 0; i < 16; ++i) high[i] = _mm512_setzero_si512();
  }
  transpose(low);
  transpose(high);
  const auto mask = static_cast<__mmask32>(rows >= 32 ? 0xffffffff : (1u << rows) - 1);
  __m512 bias_low = _mm512_setzero_ps(), bias_high = _mm512_setzero_ps();
  if (a.bias != nullptr) {
    bias_low = load_bias(a.bias + row, static_cast<__mmask16>(mask));
    bias_high = load_bias(a.bias + row + 16, static_cast<__mmask16>(mask >> 16));
  }
  const int64_t count = smaller(kLanes, a.m - token);
  for (int64_t t = 0; t < count; ++t) {
    const __m512bh both =
        _mm512_cvtne2ps_pbh(_mm512_add_ps(_mm512_castsi512_ps(high[t]), bias_high),
                            _mm512_add_ps(_mm512_castsi512_ps(low[t]), bias_low));
    _mm512_mask_storeu_epi16(a.y + (token + t) * a.n + row, mask, reinterpret_cast<__m512i>(both));
  }
}

// The order in which a thread reads its row groups: a panel of groups, a chunk of inputs of each.
struct Walk {
  const Rows8* packed;
  int64_t input_blocks;
  int64_t end;  // of the row groups

  int64_t groups(int64_t start) const { return smaller(tuning::kPanelGroups, end - start); }

  int64_t steps(int64_t start) const {
    return groups(start) * ceil_div(input_blocks, tuning::kChunkBlocks);
  }

  // The first block of a step of the panel that begins at row group `start`, or of a step of the
  // next panel when there are not as many; null past the end.
  const Rows8* block(int64_t start, int64_t step) const {
    if (step >= steps(start)) {
      step -= steps(start);
      start += tuning::kPanelGroups;
      if (start >= end || step >= steps(start)) return nullptr;
    }
    const int64_t group = start + step % groups(start);
    return packed + group * input_blocks + step / groups(start) * tuning::kChunkBlocks;
  }
};

// Row groups begin..end-1, a panel's worth at a time: all inputs, then out.
void run(const LinearArguments& a, const Tokens& tokens, int64_t begin, int64_t end) {
  const Walk walk{static_cast<const Rows8*>(a.packed), tokens.input_blocks, end};
  const int64_t stride = tokens.vectors * kLanes;
  constexpr int64_t kPanelRows = tuning::kPanelGroups * kRows;
  auto* sums =
      static_cast<float*>(thread_scratch(Scratch::kSums, kPanelRows * stride * sizeof(float)));
  auto* panel =
      static_cast<bf16*>(thread_scratch(Scratch::kPanel, kRows * kChunkInputs * sizeof(bf16)));
  for (int64_t start = begin; start < end; start += tuning::kPanelGroups) {
    const int64_t groups = walk.groups(start);
    for (int64_t step = 0; step < walk.steps(start); ++step) {
      const int64_t first_block = step / groups * tuning::kChunkBlocks;
      const int64_t blocks = smaller(tuning::kChunkBlocks, tokens.input_blocks - first_block);
      const int64_t next = first_block + blocks < tokens.input_blocks ? first_block + blocks : 0;
      const Fetches fetches{walk.block(start, step + tuning::kManyAhead),
                            reinterpret_cast<const char*>(tokens.chunk(next)) +
                                step % groups * stride * kChunkInputs * sizeof(bf16) / groups};
      expand(walk.block(start, step), blocks, panel);
      multiply_all(panel, tokens, tokens.chunk(first_block), blocks,
                   sums + step % groups * kRows * stride, first_block == 0, fetches);
    }
    for (int64_t r = 0; r < groups * kRows; r += 32) {
      const int64_t row = start * kRows + r;
      const int64_t rows = smaller(smaller(32, groups * kRows - r), a.n - row);
      if (rows <= 0) break;
      for (int64_t v = 0; v < tokens.vectors; ++v) {
        store(a, sums + r * stride + v * kLanes, stride, row, rows, v * kLanes);
      }
    }
  }
}

}  // namespace

void avx512_many_tokens(const LinearArguments& arguments) {
  constexpr int64_t kTokens = tuning::kTokenVectors * kLanes;
  for (int64_t first = 0; first < arguments.m; first += kTokens) {
    LinearArguments a = arguments;
    a.x += first * a.x_stride;
    a.y += first * a.n;
    a.m = smaller(kTokens, arguments.m - first);
    const Tokens tokens = pack_activations(a);
    parallel_for(ceil_div(a.n, kRows),
                 [&](int64_t begin, int64_t end) { run(a, tokens, begin, end); });
  }
}

}  // namespace permllm::cpu
