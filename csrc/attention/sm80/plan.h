// How the sm_80 forward kernel cuts a call: its form and tiles, its shared memory, its blocks, and
// its splits of the keys. Plain host arithmetic of the shape: never of the GPU's size, nor of the
// lengths that lie in device memory, so that a graph can capture the launch; and what happens to a
// row depends on its own sequence alone, so that its bits do too.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/mask.h"
#include "attention/params.h"
#include "attention/softmax.h"
#include "dropout.h"
#include "types.h"

namespace flashkern::attention::sm80 {

// Keys of a tile: 16 KiB of keys, and as much of values, but for short rows. The same in every form
// of the kernel, so that a row has the same bits in each of them.
FK_HOST_DEVICE constexpr int tile_keys(int row_bytes) {
  return row_bytes > 512 ? 16 : row_bytes > 256 ? 32 : 64;
}

// The forms of the kernel: a block is form_warps warps of 16 form_strips query rows.
//
//   few      1 warp,  16 rows    two stages of keys and values: bytes in flight are all that counts
//   narrow   4 warps, 64 rows    one stage (float32 beyond 128 columns: 2 warps, 32 rows); with a
//                                beam table for any number of rows
//   wide     4 warps, 128 rows   one stage; two strips share each key that is read from shared
//                                memory. Half precision up to 128 columns: beyond, the sums of two
//                                strips are more than a thread has registers
//   plain    as wide, for scores that take a scale and a band alone, of contiguous keys
enum class Form { kFew, kNarrow, kWide, kPlain };

FK_HOST_DEVICE constexpr int form_warps(Form form, int row_bytes) {
  return form == Form::kFew ? 1 : row_bytes > 512 ? 2 : 4;
}
FK_HOST_DEVICE constexpr bool has_wide(int dim, int element_bytes) {
  return element_bytes == 2 && dim <= 128;
}
FK_HOST_DEVICE constexpr int form_strips(Form form) { return form < Form::kWide ? 1 : 2; }
FK_HOST_DEVICE constexpr int form_stages(Form form) { return form == Form::kFew ? 2 : 1; }
FK_HOST_DEVICE constexpr int form_rows(Form form, int row_bytes) {
  return 16 * form_strips(form) * form_warps(form, row_bytes);
}

// Sequences of up to so many query rows (a KV head's heads times their queries) have their keys
// split: a decoding step, or a chunk of 32 tokens for a group of 4 heads, is a tile or two of each
// KV head, which fill no machine. Where beams share the keys, the rows of one of them count: all
// of them together are a step too.
inline constexpr int kSplitRows = 128;

FK_HOST_DEVICE constexpr int ceil_div(int x, int y) { return (x + y - 1) / y; }

// Keys of a split: multiples of every tile, from `least` to `most`. Sequences of up to kFewRows
// rows leave small parts, so they have kFewSplits wherever each gets `least` keys: with 8 KV heads
// 4096 keys are 256 warps that have two tiles of 64 keys each. In splits of `most` they would be 64
// warps, for half of the multiprocessors, of eight tiles each. Longer sequences fill a machine with
// larger splits, which spare memory, the merge's time, and a graph's blocks for keys yet to come.
inline constexpr int kFewRows = 16, kFewSplits = 64;

struct SplitKeys {
  int least = 0, most = 0;

  FK_HOST_DEVICE int of(int rows, int keys) const {
    if (rows > kFewRows) return most;
    return static_cast<int>(clamped(64 * ceil_div(keys, 64 * kFewSplits), least, most));
  }

  // Splits of any sequence of `rows` rows (or more, up to kSplitRows) and up to `keys` keys.
  // Shorter ones may have more than the longest, whose splits may be larger.
  int most_splits(int64_t rows, int64_t keys) const {
    const int count = static_cast<int>(keys);
    int splits = rows <= kSplitRows ? ceil_div(count, most) : 1;
    if (rows <= kFewRows) splits = std::max(splits, std::min(ceil_div(count, least), kFewSplits));
    return std::max(splits, 1);
  }
};

// `joined`: a prompt's keys, of which a part holds the rows of all its beams, and the beams' own.
inline SplitKeys choose_split_keys(int dim, bool joined) {
  const int most = dim > 128 ? 256 : 512;
  return {joined ? most : 128, most};
}

// How one sequence uses the blocks of a KV head.
struct SequenceCut {
  int rows, tiles, split_keys, splits = 1;

  // `rows`: of each of the beams that share the keys.
  FK_HOST_DEVICE SequenceCut(int64_t rows, int64_t beams, int64_t keys, int tile_rows,
                             const SplitKeys& split)
      : rows(static_cast<int>(rows * beams)),
        tiles(ceil_div(this->rows, tile_rows)),
        split_keys(split.of(static_cast<int>(rows), static_cast<int>(keys))) {
    if (rows <= kSplitRows && keys > split_keys) {
      splits = ceil_div(static_cast<int>(keys), split_keys);
    }
  }

  FK_HOST_DEVICE int blocks() const { return tiles * splits; }
};

// What all scores of a call share: a kernel's constants, which take no registers.
struct ScoreRule {
  float scale = 0, cap = 0;  // in units of log2; scale / softcap where there is one
  float keep = 1;            // the factor of what dropout keeps
  bool drops = false;
  uint32_t below = 0;  // a random word up to here drops its probability

  ScoreRule() = default;
  explicit ScoreRule(const Problem& p)
      : scale(static_cast<float>(p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2e)),
        cap(static_cast<float>(p.softcap * kLog2e)),
        keep(static_cast<float>(1 / (1 - p.dropout_p))),
        drops(dropout_threshold(p.dropout_p) > 0),
        below(static_cast<uint32_t>(dropout_threshold(p.dropout_p) - 1)) {}
};

struct ForwardPlan {
  Form form = Form::kFew;
  bool plain = false;  // scores take a positive scale and a band, nothing else
  ScoreRule rule;
  float scale = 1;       // what makes logits of scores, once options have had their way
  bool aligned = false;  // rows start at multiples of 16 bytes
  int dim = 0;           // the bucket of head_dim and value_dim: 32, 64, 128 or 256
  int warps = 0;
  int tile_rows = 0, tile_keys = 0;
  int shared_bytes = 0;
  int most_blocks = 0;      // of any sequence, for one KV head
  int blocks_per_head = 0;  // of a sequence for one KV head; of a ragged batch, all its sequences
  int64_t blocks = 0;
  SplitKeys split_keys;
  int splits = 1;           // at most, of any sequence
  bool parts_only = false;  // rows are never finished by a block: a merge follows
  bool joined = false;      // keys that beams share have been met by a launch before this one
  int split_rows = 0;       // of a sequence whose keys are split, at most
  int64_t slot_rows = 0;    // of the workspace, and those of a KV head
  int64_t head_rows = 0;
  int64_t workspace_floats = 0;

  // Where the rows of a sequence's parts start among those of a KV head. Those of a ragged batch
  // have a slot for each split_keys.most of the packed keys: the longest of its sequences is no
  // matter.
  FK_HOST_DEVICE int64_t first_row(const Problem& p, int64_t batch, int64_t k_start) const {
    return slot_rows * (p.cu_seqlens_q == nullptr ? batch : batch + k_start / split_keys.most);
  }
};

// Floats of one row of a part: value_dim sums, the maximum, the sum; and a multiple of 16 bytes.
FK_HOST_DEVICE inline int64_t part_floats(const Problem& p) { return p.value_dim + 4; }

// What a block keeps beside its tiles: its work and, of each row, what scores ask of it.
inline constexpr int kWorkBytes = 128, kRowBytes = 64;

FK_HOST_DEVICE constexpr int forward_shared_bytes(Form form, int row_bytes) {
  const int rows = form_rows(form, row_bytes);
  return row_bytes * (rows + 2 * form_stages(form) * tile_keys(row_bytes)) + kWorkBytes +
         rows * kRowBytes;
}

// Whether softmax(scale Q K^T) V within a band, and perhaps with sinks, is all that is asked.
inline bool plain_scores(const Problem& p) {
  return p.softcap == 0 && p.alibi_slopes == nullptr && p.bias.kind == BiasKind::kNone &&
         p.dropout_p == 0 && static_cast<float>(p.scale) >= 1e-30f;
}

inline Form choose_form(const Problem& p, const ForwardPlan& plan, int element_bytes) {
  const int64_t rows = p.packed_rows() * p.seq_q;
  if (rows <= 16) return Form::kFew;
  const bool narrow = rows <= 64 || !has_wide(plan.dim, element_bytes);
  if (narrow || p.beam_table != nullptr) return Form::kNarrow;
  return plan.plain && plan.aligned && p.page_table == nullptr ? Form::kPlain : Form::kWide;
}

// Blocks of one KV head. A ragged batch gets room for all that its packed rows can need: so many
// whole tiles and one more for each sequence; and the splits of those sequences that have few rows,
// up to kFewRows (one tile) or up to split_rows. work.h says which block does what.
inline int count_blocks(const Problem& p, ForwardPlan& plan) {
  const int64_t rows = p.group() * p.seq_q;
  const auto tiles = [&](int64_t rows) { return ceil_div(static_cast<int>(rows), plan.tile_rows); };
  if (p.cu_seqlens_q == nullptr) {
    plan.splits = plan.split_keys.most_splits(rows, p.seq_k);
    return plan.most_blocks = tiles(rows * p.row_beams) * plan.splits;
  }
  plan.splits = plan.split_keys.most_splits(p.group(), p.seq_k);
  const int split = tiles(plan.split_rows), few = std::min(split, 1);
  plan.most_blocks = std::max(
      {tiles(rows), few * plan.splits, split * plan.split_keys.most_splits(kSplitRows, p.seq_k)});
  int64_t blocks = p.group() * p.packed_q / plan.tile_rows + p.batch;
  if (plan.splits > 1) {
    const auto [least, most] = plan.split_keys;
    blocks += std::max(split, most / least) * p.packed_k / most + split * p.batch;
  }
  return static_cast<int>(std::min(blocks, p.batch * plan.most_blocks));
}

// The keys of one problem, before its parts of the workspace are known.
inline ForwardPlan plan_keys(const Problem& p, bool joined) {
  ForwardPlan plan;
  plan.parts_only = joined;
  const int64_t dim = std::max(p.head_dim, p.value_dim);
  plan.plain = plain_scores(p);
  plan.rule = ScoreRule(p);
  if (plan.plain) plan.scale = plan.rule.scale;
  plan.dim = dim <= 32 ? 32 : dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
  const int element_bytes = p.dtype == DType::kFloat32 ? 4 : 2;
  const int row_bytes = plan.dim * element_bytes;
  plan.aligned = rows_aligned(p.query, element_bytes) && rows_aligned(p.key, element_bytes) &&
                 rows_aligned(p.value, element_bytes);
  plan.form = choose_form(p, plan, element_bytes);
  plan.warps = form_warps(plan.form, row_bytes);
  plan.tile_rows = form_rows(plan.form, row_bytes);
  plan.tile_keys = tile_keys(row_bytes);
  plan.shared_bytes = forward_shared_bytes(plan.form, row_bytes);
  plan.split_keys = choose_split_keys(plan.dim, joined);
  plan.split_rows = static_cast<int>(std::min<int64_t>(p.group() * p.seq_q, kSplitRows));
  plan.blocks_per_head = count_blocks(p, plan);
  plan.blocks = p.kv_heads * plan.blocks_per_head * (p.cu_seqlens_q == nullptr ? p.batch : 1);
  return plan;
}

// Parts of a row that are of keys which its beams share: the first of its parts.
FK_HOST_DEVICE inline int shared_parts(const Problem& p, int64_t q_length, int64_t keys,
                                       const SplitKeys& split) {
  return SequenceCut(p.group() * q_length, p.beams, keys, 1, split).splits;
}

inline ForwardPlan plan_forward(const ForwardParams& p) {
  const bool joined = p.shared.key.data != nullptr;
  ForwardPlan plan = plan_keys(p, joined);
  plan.joined = joined;
  int parts = plan.splits;
  if (joined) {
    plan.split_rows = static_cast<int>(p.group() * p.seq_q);
    parts += plan.split_keys.most_splits(plan.split_rows, p.shared_keys);
  }
  if (parts > 1) {
    plan.slot_rows = parts * plan.split_rows;
    if (p.cu_seqlens_q != nullptr) {
      const int few = std::min(plan.split_rows, kFewRows);
      plan.slot_rows =
          std::max(plan.split_rows, few * (plan.split_keys.most / plan.split_keys.least));
    }
    plan.head_rows = plan.first_row(p, p.batch, p.packed_k);
    plan.workspace_floats = p.kv_heads * plan.head_rows * part_floats(p);
  }
  return plan;
}

// The launch of the keys that beams share (shared_part), whose parts are those of `whole`.
inline ForwardPlan plan_shared(const ForwardParams& shared, const ForwardPlan& whole) {
  ForwardPlan plan = plan_keys(shared, true);
  plan.slot_rows = whole.slot_rows;
  plan.head_rows = whole.head_rows;
  return plan;
}

}  // namespace flashkern::attention::sm80
