// How a beam top-k is cut into tasks, and what it costs. Nothing here depends on values, and no
// result depends on the cut: a chunk's sums are the chunk's own, the choice is a total order's.
#pragma once

#include <algorithm>
#include <cstdint>

#include "beam/params.h"

namespace flashkern::beam {

// Elements that share one maximum. Smaller chunks make a sharper threshold, larger ones cost fewer
// horizontal reductions; fixed, because a beam's log-sum-exp is rounded chunk by chunk.
inline constexpr int64_t kChunk = 512;
// A beam's statistics are padded to whole groups of lanes (cpu/scan.h).
inline constexpr int64_t kGroup = 32;
// Elements that share one sum, of one task of the scan: some 5 microseconds of work.
inline constexpr int64_t kSlice = 32 * kChunk;

struct Plan {
  int64_t chunks = 0;                            // of one beam
  int64_t slices = 0;                            // scan tasks of one beam
  int64_t padded_chunks = 0, padded_slices = 0;  // the same, in whole groups
  int64_t segments = 0;                          // gather tasks of one batch row
  int workers = 1;                               // threads that have something to do
  int64_t workspace_bytes = 0;                   // chunks' maxima, slices' sums
  int64_t read_bytes = 0, write_bytes = 0;
  double flops = 0;
};

inline Plan plan_topk(const TopkParams& p, int threads) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t element = p.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t beams = p.batch * p.beams, elements = beams * p.vocab;
  Plan plan;
  plan.chunks = ceil_div(p.vocab, kChunk);
  plan.padded_chunks = ceil_div(plan.chunks, kGroup) * kGroup;
  plan.slices = ceil_div(p.vocab, kSlice);
  plan.padded_slices = ceil_div(plan.slices, kGroup) * kGroup;
  plan.workers = static_cast<int>(std::clamp<int64_t>(elements / kSlice, 1, threads));
  // Rows side by side keep the threads busy; a few rows are cut further.
  plan.segments =
      p.batch >= plan.workers ? 1 : ceil_div(plan.workers, std::max<int64_t>(1, p.batch));
  plan.segments = std::min(plan.segments, std::max<int64_t>(1, p.beams * plan.chunks / 64));
  plan.workspace_bytes = beams * (plan.padded_chunks + 2 * plan.padded_slices) * sizeof(float);
  plan.read_bytes = elements * element + beams * 4;
  plan.write_bytes = p.batch * p.k * (4 + 8 + 8) + beams * 4;
  plan.flops = 2.0 * elements;  // one maximum and one exp-and-add; an exp counts as one
  return plan;
}

}  // namespace flashkern::beam
