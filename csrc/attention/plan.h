// Which kernel a sequence gets, how it is cut into tasks, and how much work that is. Plain
// functions of the shape: never of the thread count, and never of the other sequences of a batch,
// so that a row's result is the same bits whatever runs beside it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/mask.h"
#include "attention/params.h"

namespace flashkern::attention {

// Keys of one step of the online softmax. With a panel's 8 to 32 queries their scores are 4 to 16
// KiB, which stay in L1 between the two products.
inline constexpr int64_t kKeyBlock = 128;

// Up to this many query rows of a KV head (its heads times their queries) the kernel streams the
// cache with dot products; above it, query rows fill the lanes of the matrix kernel, or its tiles,
// which pay sooner.
inline constexpr int64_t decode_rows(DType dtype, bool tiles) {
  return tiles && dtype == DType::kBFloat16 ? 8 : 16;
}

// Rows of the matrix kernel's task, a multiple of 32, the widest panel: with 128, packed queries,
// outputs and a block of keys and values fit half of an L2 of 512 KiB. Keys and values of 16 bits
// are widened or paired before they are multiplied: twice as many rows share that work, in twice
// the memory.
inline constexpr int64_t kMaxTaskRows = 256;
inline int64_t max_task_rows(DType dtype) {
  const bool half = dtype == DType::kBFloat16 || dtype == DType::kFloat16;
  return half ? kMaxTaskRows : kMaxTaskRows / 2;
}

// The cache is split only where there are too few rows to keep a machine busy without it.
inline constexpr int64_t kSplitRows = 64;
inline constexpr int64_t kDecodeSplitElements = 128 * 1024;  // of keys and values, one task
inline constexpr int64_t kMatrixSplitKeys = 1024;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct SequencePlan {
  bool decode = false;
  int64_t rows = 0;        // query rows of one KV head: a group's, times q_length
  int64_t task_rows = 0;   // of which one task takes so many
  int64_t row_tasks = 0;   // ceil(rows / task_rows)
  int64_t first_key = 0;   // splits count from here, a multiple of split_keys
  int64_t split_keys = 0;  // keys of one split
  int64_t splits = 1;      // parts to merge; 1: the task writes the output itself

  int64_t tasks_per_head() const { return row_tasks * splits; }
};

inline int64_t decode_split_keys(int64_t head_dim, int64_t value_dim) {
  const int64_t keys = kDecodeSplitElements / (head_dim + value_dim);
  return std::clamp<int64_t>(keys / kKeyBlock * kKeyBlock, 2 * kKeyBlock, 8 * kKeyBlock);
}

inline SequencePlan plan_sequence(const Problem& p, const Sequence& s, bool tiles) {
  SequencePlan plan;
  plan.rows = p.packed_rows() * s.q_length;
  if (plan.rows == 0) {
    plan.splits = 0;
    return plan;
  }
  plan.decode = plan.rows <= decode_rows(p.dtype, tiles);
  const int64_t blocks = ceil_div(plan.rows, max_task_rows(p.dtype));
  plan.task_rows = plan.decode ? plan.rows : round_up(ceil_div(plan.rows, blocks), 32);
  plan.row_tasks = ceil_div(plan.rows, plan.task_rows);

  const Interval keys = Band(p, s).some_keys(0, s.q_length);
  plan.split_keys = plan.decode ? decode_split_keys(p.head_dim, p.value_dim) : kMatrixSplitKeys;
  if (plan.rows > kSplitRows) plan.split_keys = round_up(std::max<int64_t>(keys.end, 1), kKeyBlock);
  plan.first_key = keys.begin / plan.split_keys * plan.split_keys;
  if (!keys.empty()) plan.splits = ceil_div(keys.end - plan.first_key, plan.split_keys);
  return plan;
}

// Pairs (query, key) that the band lets through, over the whole batch, for one query head.
inline int64_t visible_pairs(const Problem& p) {
  int64_t pairs = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    const Band band(p, s);
    for (int64_t i = 0; i < s.q_length; ++i) pairs += band.keys(i).size();
  }
  return pairs;
}

// Multiply-adds count two. The backward pass does five products where the forward pass does two.
inline double forward_flops(const Problem& p) {
  return 2.0 * p.heads * visible_pairs(p) * (p.head_dim + p.value_dim);
}
inline double backward_flops(const Problem& p) { return 2.5 * forward_flops(p); }

// Every input read once and every output written once.
inline double forward_bytes(const Problem& p, int64_t element) {
  double bytes = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    const double keys = Band(p, s).some_keys(0, std::max<int64_t>(s.q_length, 1)).size();
    bytes += (p.heads * static_cast<double>(s.q_length) + p.kv_heads * keys) * element *
             (p.head_dim + p.value_dim);
    bytes += 4.0 * p.heads * s.q_length;
  }
  return bytes;
}

}  // namespace flashkern::attention
