// How the sm_80 forward kernel cuts a call: its tile and shared memory, its blocks, and its splits
// of the keys. Plain host arithmetic of the shape: never of the GPU's size, nor of the lengths that
// lie in device memory, so that a graph can capture the launch; and what happens to a row depends
// on its own sequence alone, so that its bits do too.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/params.h"
#include "types.h"

namespace flashkern::attention::sm80 {

// A tile of keys or of values takes at most 16 KiB, four of them (two stages each) 64 KiB; queries
// at most 32 KiB. That fits every GPU since sm_80, the 99 KiB of sm_86 and sm_89 too.
inline constexpr int kTileBytes = 16 * 1024;

FK_HOST_DEVICE constexpr int tile_keys(int row_bytes) {
  return row_bytes > 512 ? 16 : row_bytes > 256 ? 32 : 64;
}
FK_HOST_DEVICE constexpr int most_warps(int row_bytes) { return row_bytes > 512 ? 2 : 4; }

// Sequences of up to so many query rows (a KV head's heads times their queries) have their keys
// split: there are too few rows to fill a machine.
inline constexpr int kSplitRows = 64;

// Keys of one split: a multiple of every tile_keys.
FK_HOST_DEVICE constexpr int split_keys(int dim) { return dim > 128 ? 256 : 512; }

// How one sequence uses the blocks of its KV heads.
struct SequenceCut {
  int rows, tiles, splits;

  FK_HOST_DEVICE SequenceCut(int64_t rows, int64_t keys, int tile_rows, int split_keys)
      : rows(static_cast<int>(rows)),
        tiles(static_cast<int>((rows + tile_rows - 1) / tile_rows)),
        splits(1) {
    if (rows <= kSplitRows && keys > split_keys) {
      splits = static_cast<int>((keys + split_keys - 1) / split_keys);
    }
  }

  FK_HOST_DEVICE int blocks() const { return tiles * splits; }
};

struct ForwardPlan {
  int dim = 0;    // the bucket of head_dim and value_dim: 32, 64, 128 or 256
  int warps = 0;  // 16 query rows each
  int tile_keys = 0;
  int shared_bytes = 0;
  int blocks_per_head = 0;
  int64_t blocks = 0;
  int split_keys = 0;
  int splits = 1;      // at most, of any sequence
  int split_rows = 0;  // rows of a KV head in the workspace
  int64_t workspace_floats = 0;
};

inline ForwardPlan plan_forward(const Problem& p) {
  ForwardPlan plan;
  const int64_t dim = std::max(p.head_dim, p.value_dim);
  plan.dim = dim <= 32 ? 32 : dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
  const int row_bytes = plan.dim * (p.dtype == DType::kFloat32 ? 4 : 2);
  const int64_t rows = p.group() * p.seq_q;
  plan.warps = rows <= 16 ? 1 : most_warps(row_bytes);
  plan.tile_keys = tile_keys(row_bytes);
  plan.shared_bytes = row_bytes * (16 * plan.warps + 4 * plan.tile_keys);
  plan.split_keys = split_keys(plan.dim);

  const int tile_rows = 16 * plan.warps;
  plan.split_rows = static_cast<int>(std::min<int64_t>(rows, kSplitRows));
  const SequenceCut whole(rows, p.seq_k, tile_rows, plan.split_keys);
  const SequenceCut split(plan.split_rows, p.seq_k, tile_rows, plan.split_keys);
  const bool ragged = p.cu_seqlens_q != nullptr;  // some sequence may have few rows
  plan.splits = ragged ? split.splits : whole.splits;
  plan.blocks_per_head = ragged ? std::max(whole.tiles, split.blocks()) : whole.blocks();
  plan.blocks = p.batch * p.kv_heads * plan.blocks_per_head;
  if (plan.splits > 1) {
    plan.workspace_floats =
        p.batch * p.kv_heads * plan.splits * plan.split_rows * (p.value_dim + 2);
  }
  return plan;
}

}  // namespace flashkern::attention::sm80
