// From maxima to the chunks that are read again.
//
// The warp that ends a beam (last of the blocks that share it) turns the greatest logits of the
// beam's chunks into the scores of these, and notes each span's best: that is spread over the GPU.
// The block that ends the row then finds the k-th best span, where there are many, and the k-th
// best chunk in those that reach it. A span that k others precede holds no chunk that k do not.
#pragma once

#include "beam/sm80/row.h"
#include "beam/sm80/scan.h"
#include "ptx/global.h"

namespace flashkern::beam::sm80 {

// Whether this is the last of so many that draw the ticket; then it is handed what the others have
// written.
FK_DEVICE bool draws_last(int* ticket, int64_t of) {
  const bool last = ptx::add_acquire_release(ticket, 1) == of - 1;
  if (last) *ticket = 0;  // for the next launch
  return last;
}

// Calls f(i, load(i)) for i = first, first + step, ... below count: four loads are under way.
template <class Load, class F>
FK_DEVICE void each_of_four(uint32_t first, uint32_t step, uint32_t count, const Load& load,
                            const F& f) {
  for (uint32_t i = first; i < count; i += 4 * step) {
    uint4 loaded[4] = {};
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      if (i + j * step < count) loaded[j] = load(i + j * step);
    }
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      if (i + j * step < count) f(i + j * step, loaded[j]);
    }
  }
}

// By a warp: the beam's log-sum-exp, and its chunks' keys.
template <class T, bool kConstrained>
FK_DEVICE void end_beam(const TopkParams& p, const Row<T, kConstrained>& row, uint32_t b) {
  const int64_t at = row.beam_of_batch(b);
  Normaliser n{0.f, 0.f, p.beam_scores[at]};
  float logsumexp;
  if (p.given_logsumexp != nullptr) {
    n.shift = logsumexp = p.given_logsumexp[at];
  } else {
    n = normaliser(row.sums() + b * row.spans(), row.spans(), n.beam_score, logsumexp);
  }
  if (ptx::lane_id() == 0) {
    row.normalisers()[b] = n;
    p.logsumexp[at] = logsumexp;
  }
  uint4* keys = reinterpret_cast<uint4*>(row.keys()) + b * row.spans();
  uint32_t* span_keys = row.span_keys() + b * row.spans();
  const auto key = [&](uint32_t best) { return best == 0 ? 0 : ordered(score(score_of(best), n)); };
  const auto load = [&](uint32_t i) { return keys[i]; };
  each_of_four(ptx::lane_id(), 32, row.spans(), load, [&](uint32_t i, const uint4& best) {
    const uint4 own = {key(best.x), key(best.y), key(best.z), key(best.w)};
    keys[i] = own;
    span_keys[i] = max(max(own.x, own.y), max(own.z, own.w));
  });
}

// Ends the beams of which this block is the last to have scanned a part.
template <class T, bool kConstrained>
FK_DEVICE void end_beams(const Arguments& args, const Row<T, kConstrained>& row) {
  const uint32_t each = args.plan.split_spans, begin = row.split() * each;
  const uint32_t end = min(begin + each, static_cast<uint32_t>(args.plan.row_spans));
  __syncthreads();  // what the block has scanned is any warp's to hand on
  for (uint32_t b = begin / row.spans() + ptx::warp_id(); b * row.spans() < end; b += kWarps) {
    const uint32_t first = b * row.spans(), last = first + row.spans() - 1;
    const uint32_t blocks = last / each - first / each + 1;
    bool ended = blocks == 1;
    if (!ended) {
      int* ticket = args.tickets + args.problem.batch + row.beam_of_batch(b);
      if (ptx::lane_id() == 0) ended = draws_last(ticket, blocks);
      ended = __any_sync(ptx::kAllLanes, ended);
      __syncwarp();  // what lane 0 was handed is the warp's
    }
    if (ended) end_beam(args.problem, row, b);
  }
}

// Lists at least the k best spans.
template <class T, bool kConstrained>
FK_DEVICE void list_spans(const Arguments& args, Storage& shared, const Row<T, kConstrained>& row) {
  const uint32_t count = args.plan.row_spans;
  const auto load = [&](uint32_t i) { return reinterpret_cast<const uint4*>(row.span_keys())[i]; };
  const auto spans = [&](auto&& f) {
    each_of_four(threadIdx.x, kThreads, (count + 3) / 4, load, [&](uint32_t i, const uint4& keys) {
      const uint32_t four[4] = {keys.x, keys.y, keys.z, keys.w};
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        if (4 * i + j < count) f(candidate(four[j], 4 * i + j));
      }
    });
  };
  Range range;
  while (narrow(shared.select, range, args.problem.k, spans) > args.plan.chosen_limit) {
  }
  spans([&](Candidate c) {
    if (c >= range.low) shared.spans[atomicAdd(&shared.span_count, 1u)] = index_of(c);
  });
  __syncthreads();
}

// Calls the chosen chunks into the L2 cache, all of them at once: a thread for 128 bytes.
template <class T, bool kConstrained>
FK_DEVICE void call_chosen(const Row<T, kConstrained>& row) {
  constexpr uint32_t kEach = 128 / sizeof(T), kLines = kChunk / kEach;
  const uint32_t count = row.shared.chosen_count * kLines, *chosen = row.chosen();
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
    const uint32_t place = chosen[i / kLines];
    const int64_t at = place % row.places() * kChunk + i % kLines * kEach;
    if (at < row.vocab()) ptx::prefetch(row.beam(place / row.places()) + at);
  }
}

// Chooses the chunks to read again: at least those with the k best greatest logits. Returns a
// candidate that at least k elements reach, the k best of them in these chunks.
template <class T, bool kConstrained>
FK_DEVICE Candidate rank(const Arguments& args, Storage& shared, const Row<T, kConstrained>& row) {
  const Plan& plan = args.plan;
  const bool listed = plan.lists_spans;
  if (ptx::thread_id() == 0) {
    shared.span_count = listed ? 0 : plan.row_spans;
    shared.chosen_count = shared.count = 0;
  }
  __syncthreads();
  if (listed) list_spans(args, shared, row);

  const auto span = [&](uint32_t i) { return listed ? shared.spans[i] : i; };
  const auto load = [&](uint32_t i) { return reinterpret_cast<const uint4*>(row.keys())[span(i)]; };
  const auto chunks = [&](auto&& f) {  // equal ones: the first is the better
    each_of_four(threadIdx.x, kThreads, shared.span_count, load,
                 [&](uint32_t i, const uint4& keys) {
                   const uint32_t first = 4 * span(i);
                   f(candidate(keys.x, first)), f(candidate(keys.y, first + 1));
                   f(candidate(keys.z, first + 2)), f(candidate(keys.w, first + 3));
                 });
  };
  const bool all = plan.row_chunks < args.problem.k;  // then range.low stays below all scores
  Range range;
  while (!all && narrow(shared.select, range, args.problem.k, chunks) > plan.chosen_limit) {
  }
  chunks([&](Candidate c) {
    const bool empty = ordered_of(c) == 0;  // nothing is allowed, or no chunk
    if (c < range.low || empty) return;
    row.chosen()[atomicAdd(&shared.chosen_count, 1u)] = index_of(c);
  });
  __syncthreads();
  call_chosen(row);
  // Elements equal to the threshold count up to the end of the last chunk that was chosen for being
  // equal: each chosen chunk has one that is greater, or equal and not behind that.
  const uint32_t last =
      min(index_of(range.low), static_cast<uint32_t>(args.problem.beams) * row.places() - 1);
  const int64_t end = min((last % row.places() + 1) * kChunk, row.vocab());
  return candidate(ordered_of(range.low), last / row.places() * row.vocab() + end - 1);
}

}  // namespace flashkern::beam::sm80
