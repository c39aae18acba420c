// Exact selection by one block: the range that holds the k-th greatest of many 64-bit candidates,
// and a sort. Candidates are unique, so there are no ties here.
//
// A round narrows a range: its true ends, then a histogram of 2048 equal bins between them, then
// the bin with the wanted candidate. Equal bins between true ends spread the candidates whatever
// their common bits are (equal scores are spread by their index), so atomics seldom collide and
// one or two rounds mostly do; six always do, 11 bits each.
#pragma once

#include "beam/score.h"
#include "beam/sm80/plan.h"
#include "ptx/core.h"

namespace flashkern::beam::sm80 {

inline constexpr int kBinBits = 11, kBins = 1 << kBinBits;
inline constexpr int kBinsEach = kBins / kThreads;

struct SelectStorage {
  uint32_t bins[kBins];
  Candidate least[kWarps], most[kWarps];
  uint32_t sums[kWarps];
  uint32_t bin, count, before;  // what pick() found
};

// The same in all threads.
struct Range {
  Candidate low = 0, high = ~Candidate{0};
  uint32_t above = 0;  // candidates above high
};

// The least and the greatest of all threads' candidates.
FK_DEVICE void block_bounds(SelectStorage& shared, Candidate& least, Candidate& most) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    least = min(least, __shfl_xor_sync(ptx::kAllLanes, least, lanes));
    most = max(most, __shfl_xor_sync(ptx::kAllLanes, most, lanes));
  }
  if (ptx::lane_id() == 0) {
    shared.least[threadIdx.x / 32] = least;
    shared.most[threadIdx.x / 32] = most;
  }
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) {
    least = min(least, shared.least[warp]);
    most = max(most, shared.most[warp]);
  }
}

// The sum of the values of all threads before this one.
FK_DEVICE uint32_t block_sum_before(SelectStorage& shared, uint32_t value) {
  const uint32_t lane = ptx::lane_id();
  uint32_t sum = value;
#pragma unroll
  for (uint32_t lanes = 1; lanes < 32; lanes *= 2) {
    const uint32_t lower = __shfl_up_sync(ptx::kAllLanes, sum, lanes);
    if (lane >= lanes) sum += lower;
  }
  if (lane == 31) shared.sums[threadIdx.x / 32] = sum;
  __syncthreads();
  uint32_t before = sum - value;
  for (uint32_t warp = 0; warp < threadIdx.x / 32; ++warp) before += shared.sums[warp];
  return before;
}

// Finds the bin of the wanted candidate, counted from the top one: thread t owns the bins
// kBins - 1 - kBinsEach t and below.
FK_DEVICE void pick(SelectStorage& shared, uint32_t wanted) {
  const int top = kBins - 1 - kBinsEach * static_cast<int>(ptx::thread_id());
  uint32_t own = 0;
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) own += shared.bins[top - i];
  uint32_t before = block_sum_before(shared, own);
  if (before < wanted && wanted <= before + own) {
    int bin = top;
    for (; before + shared.bins[bin] < wanted; --bin) before += shared.bins[bin];
    shared.bin = bin;
    shared.count = shared.bins[bin];
    shared.before = before;
  }
  __syncthreads();
}

// One round. `source(f)` calls f for this thread's share of the candidates. Returns how many are
// at or above the new range.low; the wanted-th greatest is one of them.
template <class Source>
FK_DEVICE uint32_t narrow(SelectStorage& shared, Range& range, uint32_t wanted,
                          const Source& source) {
  Candidate least = ~Candidate{0}, most = 0;
  source([&](Candidate c) {
    if (c < range.low || c > range.high) return;
    least = min(least, c);
    most = max(most, c);
  });
  for (int i = ptx::thread_id(); i < kBins; i += kThreads) shared.bins[i] = 0;
  block_bounds(shared, least, most);
  const int shift = max(0, 64 - __clzll(static_cast<long long>(most - least)) - kBinBits);
  source([&](Candidate c) {
    if (c >= least && c <= most) atomicAdd(&shared.bins[(c - least) >> shift], 1u);
  });
  __syncthreads();
  pick(shared, wanted - range.above);
  range.low = least + (static_cast<Candidate>(shared.bin) << shift);
  range.high = range.low + min(most - range.low, (Candidate{1} << shift) - 1);
  range.above += shared.before;
  return range.above + shared.count;
}

// Sorts list[0, size), greatest first; size is a power of two. A bitonic network: a warp owns the
// same 64 elements in all steps of stride 32 and less, so only longer strides need the block. The
// barrier of the last step hands list[i] to thread i % kThreads.
FK_DEVICE void sort(Candidate* list, uint32_t size) {
  for (uint32_t run = 2; run <= size; run *= 2) {
    for (uint32_t stride = run / 2; stride > 0; stride /= 2) {
      for (uint32_t i = threadIdx.x; i < size / 2; i += kThreads) {
        const uint32_t low = 2 * i - (i & (stride - 1)), high = low + stride;
        const Candidate a = list[low], b = list[high];
        if ((a < b) == ((low & run) == 0)) {
          list[low] = b;
          list[high] = a;
        }
      }
      const uint32_t next = stride > 1 ? stride / 2 : run;
      if (stride > 32 || next > 32) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    }
  }
}

}  // namespace flashkern::beam::sm80
