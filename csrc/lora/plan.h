// How a LoRA call is cut into pieces. Rows are sorted by adapter and cut into segments: a segment
// is one task, it has one adapter, and its part of dA and dB is summed in one buffer. Segments are
// walked in blocks of rows that stay in L2. Nothing here depends on the number of threads, so sums
// have one order and results the same bits on any number of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace flashkern {

inline constexpr int64_t kLoraBlockRows = 96;  // a multiple of the micro-GEMM's 6 rows
inline constexpr int64_t kLoraBlockCols = 256;
inline constexpr int64_t kLoraMaxSegments = 32;  // for each adapter: bounds the partial sums

struct LoraSegment {
  int64_t adapter;
  int64_t begin, end;  // positions in the order of rows
};

struct LoraPlan {
  std::vector<int64_t> order;  // rows sorted by adapter; empty: as they come
  std::vector<LoraSegment> segments;
  std::vector<int64_t> first;  // segments of adapter i: [first[i], first[i + 1])
  int64_t block_rows = 0;      // the most rows that a block has
};

inline void lora_cut(LoraPlan& plan, int64_t adapter, int64_t begin, int64_t end) {
  const int64_t rows = end - begin;
  const int64_t blocks = (rows + kLoraBlockRows - 1) / kLoraBlockRows;
  const int64_t step = (blocks + kLoraMaxSegments - 1) / kLoraMaxSegments * kLoraBlockRows;
  plan.first.push_back(static_cast<int64_t>(plan.segments.size()));
  for (int64_t i = begin; i < end; i += step) {
    plan.segments.push_back({adapter, i, std::min(end, i + step)});
  }
  plan.block_rows = std::max(plan.block_rows, std::min(rows, kLoraBlockRows));
}

// Rows without an adapter (-1) are in no segment.
inline LoraPlan lora_plan(int64_t rows, int64_t adapters, const int64_t* ids) {
  LoraPlan plan;
  plan.first.reserve(adapters + 1);
  if (ids == nullptr) {
    lora_cut(plan, 0, 0, rows);
  } else {
    std::vector<int64_t> next(adapters + 1, 0);
    for (int64_t i = 0; i < rows; ++i) {
      if (ids[i] >= 0) ++next[ids[i] + 1];
    }
    for (int64_t n = 0; n < adapters; ++n) next[n + 1] += next[n];
    plan.order.resize(next[adapters]);
    for (int64_t n = 0; n < adapters; ++n) lora_cut(plan, n, next[n], next[n + 1]);
    for (int64_t i = 0; i < rows; ++i) {
      if (ids[i] >= 0) plan.order[next[ids[i]]++] = i;
    }
  }
  // No rows, no memory for ids: their pointer is null then, and the other adapters have no segment.
  plan.first.resize(adapters + 1, static_cast<int64_t>(plan.segments.size()));
  return plan;
}

}  // namespace flashkern
