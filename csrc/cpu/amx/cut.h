// How AMX cuts rows, tokens and inputs for many tokens. Include after amx/target.h.
//
// A share of rows is what one thread packed, and so touched first (pack.cpp). It has panels of its
// own, and a thread multiplies a panel with all spans of tokens before its next panel: span by
// span, as many threads as there are spans would read each panel. Units: row groups, token tiles,
// blocks of 64 inputs.
#pragma once

#include "cpu/amx/pack.h"
#include "cpu/kernels.h"
#include "cpu/tuning.h"

namespace permllm::cpu {
namespace {

struct Cut {
  struct Task {
    int64_t first_group, end_group;  // of a panel, which may be empty in the last share
    int64_t span;
  };

  Cut(const LinearArguments& a, int64_t threads)
      : blocks(ceil_div(a.k, kBlockInputs)),
        groups(ceil_div(a.n, kAmxRows)),
        tiles(ceil_div(a.m, kTileColumns)) {
    const int64_t least_spans = ceil_div(tiles, AmxTuning::kSpanTiles);
    span_tiles = ceil_div(ceil_div(tiles, least_spans), 2) * 2;
    spans = ceil_div(tiles, span_tiles);
    share_groups = ceil_div(ceil_div(groups, kAmxGroups), threads) * kAmxGroups;
    shares = ceil_div(groups, share_groups);
    const bool few = a.m <= AmxTuning::kShortTokens;
    panel_groups = few ? AmxTuning::kShortPanelGroups : AmxTuning::kPanelGroups;
    chunk_tiles = few ? AmxTuning::kShortChunkTiles : AmxTuning::kChunkTiles;
    const int64_t wanted = threads > 1 ? threads * AmxTuning::kTasksPerThread : 1;
    while (panel_groups > kAmxGroups && tasks() < wanted) panel_groups /= 2;
  }

  int64_t panels() const { return ceil_div(share_groups, panel_groups); }  // of a share
  int64_t tasks_of_share() const { return panels() * spans; }
  int64_t tasks() const { return shares * tasks_of_share(); }

  // By shares, then panels, then spans.
  Task task(int64_t item) const {
    const int64_t share = item / tasks_of_share(), panel = item % tasks_of_share() / spans;
    const int64_t first = share * share_groups + panel * panel_groups;
    const int64_t end = smaller(first + panel_groups, (share + 1) * share_groups);
    return {first, smaller(end, groups), item % spans};
  }

  int64_t first_tile(int64_t span) const { return span * span_tiles; }
  int64_t span_size(int64_t span) const { return smaller(span_tiles, tiles - first_tile(span)); }

  int64_t blocks, groups, tiles;
  int64_t span_tiles, spans;
  int64_t share_groups, shares;
  int64_t panel_groups;
  int64_t chunk_tiles;  // A tiles of a row group that are expanded at a time
};

}  // namespace
}  // namespace permllm::cpu
