// How the sm_80 backward kernel cuts a call: its tiles, and what it keeps in the workspace. Plain
// arithmetic of the shape, as in plan.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/mask.h"
#include "attention/params.h"
#include "attention/sm80/gradient.h"
#include "attention/sm80/plan.h"
#include "types.h"

namespace flashkern::attention::sm80 {

// A block's keys, the query rows of a step, and how warps share them: each has score_keys x
// score_rows of the scores at a time. `full`: more happens to a score, so twice the warps have
// half the sums each. Every form takes less than the 99 KiB of sm_86 and sm_89, and two blocks of 4
// warps share a multiprocessor of sm_80.
struct BackwardTile {
  int keys, rows, warps;
  int stages;  // of queries and of dO
  int score_keys, score_rows;
};

FK_HOST_DEVICE constexpr BackwardTile backward_tile(int dim, int element_bytes, bool full) {
  if (element_bytes == 4) {
    if (dim <= 64) return {64, 32, 4, 1, 32, 16};
    if (dim <= 128) return {32, 32, 4, 1, 16, 16};
    return {16, 16, 2, 1, 16, 8};
  }
  if (dim <= 32) return {128, 64, 4, 2, 32, 32};
  if (dim <= 64) return {128, 64, full ? 8 : 4, 2, 32, 32};
  if (dim <= 128) return {64, 64, full ? 8 : 4, 1, 32, full ? 16 : 32};
  return {32, 32, 4, 1, 16, 16};
}

// Query rows of one (batch, head) that a block of row_deltas has, and its warps.
inline constexpr int kDeltaRows = 64, kDeltaWarps = 4;

struct BackwardPlan {
  int dim = 0;  // the bucket of head_dim and value_dim: 32, 64, 128 or 256
  int keys = 0, rows = 0;
  GradientRule rule;
  int blocks_per_head = 0, delta_blocks = 0;
  int64_t head_rows = 0;   // of a KV head: every query of the batch with every head of its group
  int64_t head_tiles = 0;  // room for their tiles
  int64_t sums = 0, sinks = 0, floats = 0;  // the workspace: row numbers | dQ | sinks' parts
  int64_t ints = 0;                         // zeros: the ticket | a turn for each tile

  // Where a sequence's packed rows start, and its tiles, which share none with the next sequence's.
  FK_HOST_DEVICE int64_t first_row(const Problem& p, const Sequence& s) const {
    return (p.cu_seqlens_q != nullptr ? s.q_start : s.batch * p.seq_q) * p.group();
  }
  FK_HOST_DEVICE int64_t first_tile(const Problem& p, const Sequence& s) const {
    return first_row(p, s) / rows + s.batch;
  }

  FK_HOST_DEVICE RowNumbers* numbers(const BackwardParams& p, const Sequence& s,
                                     int64_t kv_head) const {
    return reinterpret_cast<RowNumbers*>(p.workspace) + kv_head * head_rows + first_row(p, s);
  }
};

inline BackwardPlan plan_backward(const BackwardParams& p) {
  BackwardPlan plan;
  plan.rule = GradientRule(p);
  const int64_t dim = std::max(p.head_dim, p.value_dim);
  plan.dim = dim <= 32 ? 32 : dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
  const BackwardTile tile = backward_tile(plan.dim, p.dtype == DType::kFloat32 ? 4 : 2, false);
  plan.keys = tile.keys;
  plan.rows = tile.rows;
  plan.blocks_per_head = static_cast<int>((p.seq_k + tile.keys - 1) / tile.keys);
  plan.delta_blocks = static_cast<int>((p.seq_q + kDeltaRows - 1) / kDeltaRows);
  plan.head_rows = p.query_elements / (p.kv_heads * p.head_dim);
  plan.head_tiles = plan.head_rows / tile.rows + p.batch;
  const int64_t tiles = p.kv_heads * plan.head_tiles;
  plan.sums = (2 * p.kv_heads * plan.head_rows + 3) / 4 * 4;
  plan.sinks = plan.sums;
  if (plan.blocks_per_head > 1) plan.sinks += tiles * tile.rows * plan.dim;
  plan.floats = plan.sinks;
  if (p.grad_sinks != nullptr) plan.floats += p.batch * p.heads * plan.delta_blocks * kDeltaWarps;
  plan.ints = 1 + tiles;
  return plan;
}

}  // namespace flashkern::attention::sm80
