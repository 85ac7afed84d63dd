// What was measured, not derived: a table of constants for every instruction set.
//
// "Few" and "many" are tokens. A hint is the cache that a prefetch stops in, and "ahead" how far
// before its use a block is fetched. Inputs are counted in blocks of 64, rows in row groups
// (layout.h).
#pragma once

#include <cstdint>

namespace permllm::cpu {

// prefetchnta, prefetcht0 and prefetcht1, as __builtin_prefetch counts. The first leaves no copy in
// L2, which would go on to L3.
constexpr int kPastL2 = 0, kIntoL1 = 3, kIntoL2 = 2;

struct CommonTuning {
  static constexpr int64_t kGatheredTokens = 256;  // at a time, so that the copy stays in the cache
  static constexpr int kSpins = 1000;  // of a waiting thread, before it offers its CPU to another
  static constexpr int64_t kMostRanges = 256;  // of a phase; more threads than that share them

  // Of experts: tokens of a region, whose sums are in memory, rows in memory at a time, and columns
  // of their outputs that one thread adds up.
  static constexpr int64_t kExpertTokens = 2048;
  static constexpr int64_t kExpertPairs = 2048;
  static constexpr int64_t kExpertColumns = 256;
};

// What the kernels share that were measured on Zen 4.
struct Zen4Tuning : CommonTuning {
  // So many elements of x, one thread prepares alone: that takes 5 to 8 us, about as long as
  // threads wait for each other.
  static constexpr int64_t kPreparedAlone = 16 << 10;
};

// Sapphire Rapids and its successors: 2 MiB of L2 and 17-20 GB/s of stream for one core.
struct AmxTuning : CommonTuning {
  // So many elements of x have their scales found by one thread alone: the number of Zen 4.
  static constexpr int64_t kPreparedAlone = 16 << 10;
  static constexpr int64_t kFewTokens = 32;    // beyond, expanding once for many tokens wins
  static constexpr int64_t kSplitTokens = 16;  // int8: W8A16 up to here costs no more than W8A8
  static constexpr int64_t kPartTokens = 16;   // float16: two bfloat16 each, in two tiles at most

  static constexpr int kFewHint = kIntoL1;
  static constexpr int64_t kFewAheadBytes = 2500;  // of a row group, before they are expanded
  static constexpr int64_t kFewWriteBlocks = 3;    // after the store of sums, before they are read
  static constexpr int64_t kPackBlocks = 16;       // of x, that a thread packs at a time
  static constexpr int64_t kWrittenPairs = 8;  // of row groups, whose outputs are written at once
  // Columns of a B tile that few tokens fill at most: its load and its product become cheaper.
  static constexpr int kNarrowColumns = 4, kMiddleColumns = 8;

  static constexpr int kManyHint = kIntoL2;
  // A tiles of a row group, expanded at a time: for a pair half of L1. Fewer for kShortTokens.
  static constexpr int64_t kChunkTiles = 12, kShortChunkTiles = 8;
  static constexpr int64_t kPanelGroups = 32;      // 512 rows: sums of 512 KiB with a full span
  static constexpr int64_t kShortPanelGroups = 8;  // for at most kShortTokens
  static constexpr int64_t kShortTokens = 112;
  static constexpr int64_t kSpanTiles = 16;       // 256 tokens
  static constexpr int64_t kKeptBytes = 1 << 20;  // of packed x, that L2 keeps beside the rest
  static constexpr int64_t kPackedTokens = 1024;  // that are packed at a time
  static constexpr int64_t kTasksPerThread = 2;   // panels are made smaller to get so many

  // Dense rows.
  static constexpr int64_t kDenseTokens = 64;  // four tiles: as many sums as have registers
  // Beyond, up to those, rows where they stand are faster than their copy in 12 bits, if they have
  // so many inputs: of fewer, what is written counts for more.
  static constexpr int64_t kDenseInPlaceInputs = 2048;
  static constexpr int64_t kDenseCopiedTokens = 48;
  static constexpr int kDenseRowsApart = 16;  // neighbours of a tile: next to each other is slower
  static constexpr int kDenseHint = kIntoL1;
  static constexpr int64_t kDenseAhead = 512;  // bytes of each row; 256 are too late
};

// Zen 4: 1 MiB of L2 per core, 26-30 GB/s of stream for one core.
struct Avx512Bf16Tuning : Zen4Tuning {
  static constexpr int kFewTokens = 6;        // beyond, a row is better expanded to the L1 cache
  static constexpr int kFewTokensInt8 = 6;    // the same of int8 values, on avx512_vbmi2
  static constexpr int kFewTokensDense = 1;   // of dense rows in 12 bits
  static constexpr int kFewTokensDense8 = 3;  // and of int8 values
  static constexpr int kSeveralTokens = 16;   // as many as a vector of the kernel for many has
  static constexpr int64_t kRestTokens = 12;  // beyond whole vectors: take less time apart, the
                                              // weight read again, than as a vector of 16
  static constexpr int kSplitTokens = 2;      // int8: W8A16 up to here, W8A8 beyond
  static constexpr int kPartTokens = 2;       // float16: two bfloat16 each, beyond one
  static constexpr int64_t kPackBlocks = 16;  // of x, that a thread packs at a time
  static constexpr int kSums = 24;            // vectors that the registers hold beside operands
  // A half of a row's mask goes to its register from memory instead of through a general one.
  static constexpr bool kMasksFromMemory = false;

  // Few tokens. Prefetching overlaps with the arithmetic only where it stops in L2.
  static constexpr int kFewHint = kIntoL2;
  // Bytes of a block that are fetched ahead with one token: where the arithmetic leaves it the
  // time, the hardware fetches the rest.
  static constexpr int kOneTokenFetch = 64;
  static constexpr int kOneTokenFetchInt8 = 512;  // all of it: a part of 320 made shapes slower.
                                                  // On avx512_vbmi2
  static constexpr int kOneTokenAhead = 9216;     // bytes
  static constexpr int kFewAhead = 13824;         // bytes, where one pass takes all rows
  static constexpr int kFewAheadPasses = 18432;   // and where several passes take some rows each
  static constexpr int64_t kFewChunkBytes = 20 << 10;  // of x and blocks, that these share in L1
  static constexpr int64_t kFewShortChunkBytes = kFewChunkBytes;  // where they take two rows each
  static constexpr int kFewRows = 1;  // that are expanded before a vector of x meets them all

  // Several tokens.
  static constexpr int kSeveralHint = kIntoL2;
  static constexpr int64_t kSeveralChunkBytes = 256;  // of a row, expanded at a time
  static constexpr int kSeveralAhead = 9216;          // bytes
  static constexpr int kSeveralAheadDense = 16384;    // the same of dense rows in 12 bits
  // Of sparse rows of bfloat16 values, which are in 16 bits, for up to 12 tokens and for more; on
  // Zen 5 measured in 12 bits, when those were expanded.
  static constexpr int64_t kSeveralChunkBytesUpTo12 = 1024, kSeveralChunkBytesPast12 = 1024;
  static constexpr int kSeveralHintPast12 = kIntoL1;

  // Few tokens and dense rows.
  static constexpr int kDenseTokens = 8;        // beyond, oneDNN's packed weight is faster
  static constexpr int kDenseTokensPastL1 = 8;  // the same where x of so many takes more than
  static constexpr int64_t kDenseL1Bytes = 32 << 10;
  static constexpr int kDenseRows = 3;  // at a time, with more than one token
  static constexpr int kDenseRowsOf6 = 2, kDenseRowsOf8 = 3;
  // The same of float16, whose x takes twice as much of L1; measured on Zen 5.
  static constexpr int kDenseFloat16Rows = 2, kDenseFloat16RowsOf8 = 3;
  static constexpr int64_t kDenseCacheBytes = 24 << 10;  // where 6 tokens take more, 8 are faster
  // At a time, from which on they are prefetched: the hardware fetches one row in time.
  static constexpr int kDensePrefetchedRows = 2;
  static constexpr int kDenseHint = kIntoL2;
  static constexpr int kDenseAhead = 32768;    // bytes
  static constexpr int64_t kPackVectors = 32;  // of x, that a thread packs at a time

  // Many tokens. The blocks of the next steps fit L1 and are wanted there.
  static constexpr int kManyHint = kIntoL1;      // of the row group that is decoded next
  static constexpr int kManyHintX = kIntoL2;     // those of x fit L2
  static constexpr int kManyAhead = 2;           // steps of one row group and one chunk of inputs
  static constexpr int64_t kChunkBytes = 2048;   // of a row, expanded at a time: 8 are half of L1
  static constexpr int64_t kPanelGroups = 16;    // whose sums wait in L2 for the next chunk
  static constexpr int64_t kPackedTokens = 256;  // at a time: what one expansion serves at most
  static constexpr int kVectors = 3;  // of 16 tokens that 8 rows meet at a time: 24 accumulators

  // Inputs brought to kept values, of int8 and in 12 bits. Beyond so many tokens, the places of
  // some blocks are better found once for all tiles.
  static constexpr int64_t kKeptFewTokens = 48, kKeptFewTokensInt8 = 48;
  static constexpr int64_t kKeptFewTokensInt4 = 24;
  // Bytes of a block that are fetched ahead with one token, at most; 896 are all of it.
  static constexpr int kKeptOneTokenFetch = 896, kKeptOneTokenFetchInt8 = 128;
  static constexpr int kKeptOneTokenFetchInt4 = 448;
  static constexpr int kKeptOneTokenAhead = 12288;  // bytes
  static constexpr int kKeptFewAhead = 9216;        // bytes
  // Places and values of a row group that wait in L1 for tiles of tokens.
  static constexpr int64_t kKeptChunkBytes = 8 << 10;
  static constexpr int kKeptHint = kIntoL2;
  // At a time: with fewer, places are found more often.
  static constexpr int64_t kKeptPackedTokens = 128;
  // Row groups that meet a tile of tokens one after the other, and whose outputs are written
  // together.
  static constexpr int64_t kKeptPanelGroups = 1;
};

// Zen 5: twice the products of Zen 4 in a cycle, 40-45 GB/s of stream for one core, 48 KiB of L1.
// Its hardware fetches no blocks ahead: one token without prefetches reads 12 GB/s. Moves from
// general to mask registers compete with expansions.
struct Zen5Tuning : Avx512Bf16Tuning {
  static constexpr int kFewTokens = 10;
  static constexpr int kFewTokensDense = 2;
  static constexpr bool kMasksFromMemory = true;

  static constexpr int kFewHint = kPastL2;
  static constexpr int kOneTokenFetch = 768;  // all of a block, whatever its values
  static constexpr int kOneTokenAhead = 8960;
  static constexpr int kFewAhead = 11520;
  static constexpr int kFewAheadPasses = 13824;
  static constexpr int64_t kFewChunkBytes = 12 << 10;
  static constexpr int64_t kFewShortChunkBytes = 6 << 10;
  static constexpr int kFewRows = 4;
  static constexpr int kSeveralHint = kIntoL1;
  static constexpr int kSeveralAheadDense = kSeveralAhead;
  static constexpr int64_t kSeveralChunkBytesPast12 = 512;

  static constexpr int kDenseTokensPastL1 = 4;
  static constexpr int kDenseRows = 1;
  static constexpr int kDenseRowsOf6 = 1, kDenseRowsOf8 = 2;
  static constexpr int kDensePrefetchedRows = 1;
  static constexpr int kDenseHint = kIntoL1;
  static constexpr int kDenseAhead = 8192;

  static constexpr int kKeptOneTokenFetchInt8 = 896;
  static constexpr int kKeptOneTokenAhead = 8960;
  static constexpr int kKeptFewAhead = 11520;
  static constexpr int64_t kKeptPanelGroups = 2;
  static constexpr int64_t kKeptPackedTokens = 256;
};

// Kernels in vectors of any width: of float32, measured on Zen 4, but for where many tokens begin
// on avx512, on Zen 5.
struct Float32Tuning : Zen4Tuning {
  static constexpr int kFewHint = kIntoL2;
  static constexpr int64_t kFewAheadBlocks = 16;
  static constexpr int64_t kFewChunkBlocks = 8;  // that the passes over a row group share, in L1
  static constexpr int kInOrderTokens = 0;       // up to which rows follow each other in time
  static constexpr int kFewRows = 4;             // decoded side by side, half where sums are many
  static constexpr int64_t kPackedTokens = 256;  // at a time: what one decoding serves at most
  static constexpr bool kLoadsApart = false;     // x of few tokens is loaded for each row anew
  static constexpr int kHeldVectors = 8;         // of x, while rows of a block go by
  static constexpr int kVectors = 3;             // of tokens that rows meet at a time
  static constexpr int kManyHint = kIntoL2;      // of the row group that is decoded next
  static constexpr int64_t kManyChunkBytes = 1024;  // of a row, decoded at a time: 8 are 8 KiB
  static constexpr int64_t kPanelGroups = 8;        // whose sums wait in L2
  static constexpr int64_t kWrittenTokens = 32;     // whose outputs are gathered in L1

  // Kept values alone, measured on Zen 3, and on an Intel Xeon where they begin on avx512.
  static constexpr int kKeptVectors = 8;           // of tokens that a value meets
  static constexpr int64_t kKeptPanelGroups = 16;  // whose sums, and decoded blocks, are in L2
};

struct Avx512Tuning : Float32Tuning {
  static constexpr int kFewTokens = 8;
  static constexpr int kSums = 24;  // vectors that the registers hold beside operands
};

// Measured on Zen 3. Float32 products of avx2_vnni take these too.
struct Avx2Tuning : Float32Tuning {
  // Sparse values.
  static constexpr int kLaneTokens = 32;          // at a time, whose x stays in the cache
  static constexpr int kLaneFewTokensOf4 = 32;    // in float32, of 2:4: beyond, vector/kept.h wins
  static constexpr int kLaneFewTokensOf16 = 8;    // the same of layers that are not 2:4
  static constexpr int kLaneSplitTokens = 2;      // int8: x of two parts up to here, of one beyond
  static constexpr int kLaneTile = 8;             // tokens, whose sums the registers hold
  static constexpr int64_t kKeptPanelGroups = 4;  // whose decoded blocks are in L1
  static constexpr int64_t kLaneChunkBlocks = 8;  // that tiles share in L1
  static constexpr int kLaneHint = kIntoL1;
  static constexpr int64_t kLaneAheadBytes = 8192;

  // Dense rows.
  static constexpr bool kLoadsApart = true;
  static constexpr int kInOrderTokens = 1;
  static constexpr int64_t kFewAheadBlocks = 32;
  static constexpr int kFewHint = kIntoL1;
  static constexpr int kFewTokens = 6;
  static constexpr int kSums = 12;
};

// int8 values in vectors of any width, measured on Zen 5.
struct Avx512VnniTuning : Avx512Tuning {
  static constexpr int kFewTokens = 7;
  static constexpr int kSplitTokens = 2;  // W8A16 up to here, W8A8 beyond
};

// Of dense rows; constants of lanes are those of Zen 3, and were not measured with VNNI.
struct Avx2VnniTuning : Avx2Tuning {
  static constexpr bool kLoadsApart = false;
  static constexpr int64_t kFewAheadBlocks = Float32Tuning::kFewAheadBlocks;
  static constexpr int kInOrderTokens = 0;
  static constexpr int kFewHint = kIntoL2;
  static constexpr int kSums = 10;
  static constexpr int kSplitTokens = 2;
};

// Dense rows of avx2 and avx512, and lanes of avx2.
struct Avx2Int8Tuning : Avx2Tuning {
  static constexpr int kVectors = 2;  // products want a register of their own
  static constexpr int kFewTokens = 5;
  static constexpr int kInOrderTokens = kFewTokens;
  static constexpr int kSplitTokens = 0;
};

// Values in 4 bits in lanes.
struct Avx2Int4Tuning : Avx2Int8Tuning {
  static constexpr int kLaneSplitTokens = 0;
};

struct Avx2VnniInt4Tuning : Avx2VnniTuning {
  static constexpr int kLaneSplitTokens = Avx2Int4Tuning::kLaneSplitTokens;
};

struct PortableTuning : Float32Tuning {
  static constexpr int kFewTokens = 4;
};

}  // namespace permllm::cpu
