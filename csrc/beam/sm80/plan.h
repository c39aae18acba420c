// How a beam top-k is cut into blocks on a GPU, and where each thing lies in the workspace. Plain
// host arithmetic: a unit test reads it (flashkern._host), the launcher and the kernel obey it.
//
// No result depends on the cut. A span's sum is the span's own, whichever block takes it; a span
// starts where the vocabulary says, not where a row's address is aligned.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "beam/params.h"
#include "beam/plan.h"

namespace flashkern::beam::sm80 {

inline constexpr int kWarps = 16, kThreads = 32 * kWarps;
// Chunks (of beam::kChunk elements) that one warp takes in a row, with one sum of exponentials.
inline constexpr int64_t kSpanChunks = 4;
// What the choosing block holds in shared memory; more chunks and candidates live in the workspace.
inline constexpr int64_t kSharedSpans = 8192;       // spans that may hold the best chunks
inline constexpr int64_t kSharedChosen = 1792;      // chunks that are read again
inline constexpr int64_t kSharedCandidates = 4096;  // elements that pass the threshold
inline constexpr int64_t kMaxK = int64_t{1} << 30;

// Workspace:  tickets, one for each batch row and each beam, where a stream has none (tickets.h)
//             batch times: keys | span sums | span keys | normalisers | masks | chosen | candidates
struct Layout {
  int64_t ticket_bytes = 0, row_bytes = 0;
  int64_t sums = 0, span_keys = 0, normalisers = 0, masks = 0;  // offsets in a row, bytes
  int64_t chosen = 0, candidates = 0;
};

struct Plan {
  int64_t chunks = 0, spans = 0;          // of a beam
  int64_t row_chunks = 0, row_spans = 0;  // of a batch row: all its beams
  int64_t splits = 1, split_spans = 0;    // blocks of a batch row, spans of a block
  int64_t blocks = 0;
  int64_t tickets = 0;
  bool lists_spans = false;  // whether spans are ranked first, and then the chunks of the best
  int64_t chosen_limit = 0;  // chunks that may be read again, and spans whose chunks are ranked
  int64_t capacity = 0;      // candidates that the last selection takes: a power of two
  bool shared_chosen = true, shared_candidates = true;  // or the workspace
  Layout layout;
  int64_t workspace_bytes = 0;
  int64_t read_bytes = 0, write_bytes = 0;
  double flops = 0;
};

inline int64_t power_of_two(int64_t at_least) {
  int64_t power = 1;
  while (power < at_least) power *= 2;
  return power;
}

inline Layout lay_out(const Plan& plan, const TopkParams& p) {
  const auto take = [](int64_t& end, int64_t bytes) {
    const int64_t begin = end;
    end += (bytes + 255) / 256 * 256;
    return begin;
  };
  const bool constrained = p.constraints.nodes != nullptr || p.constraints.excluded != nullptr;
  const int64_t places = plan.row_spans * kSpanChunks;  // whole spans
  Layout layout;
  take(layout.ticket_bytes, plan.tickets * 4);
  int64_t& end = layout.row_bytes;
  take(end, places * 4);
  layout.sums = take(end, plan.row_spans * 8);
  layout.span_keys = take(end, plan.row_spans * 4);
  layout.normalisers = take(end, p.beams * 12);
  layout.masks = take(end, constrained ? places * kChunk / 8 : 0);
  layout.chosen = take(end, plan.shared_chosen ? 0 : plan.chosen_limit * 4);
  layout.candidates = take(end, plan.shared_candidates ? 0 : plan.capacity * 8);
  return layout;
}

// `processors` decides how finely a row is cut, nothing else.
inline Plan plan_launch(const TopkParams& p, int processors) {
  if (p.k > kMaxK) throw std::invalid_argument("beam_topk: k must be at most 2^30 on a GPU");
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t rows = std::max<int64_t>(1, p.batch);
  Plan plan;
  plan.chunks = ceil_div(p.vocab, kChunk);
  plan.spans = ceil_div(plan.chunks, kSpanChunks);
  plan.row_chunks = p.beams * plan.chunks;
  plan.row_spans = p.beams * plan.spans;
  if (plan.row_spans > kMaxK) {
    throw std::invalid_argument("beam_topk: at most 2^30 beams, or spans of them, on a GPU");
  }

  // Two blocks fit on a processor. Some eight waves of them even out the last one; a block has a
  // span for each warp at least, where there are so many.
  const int64_t most = ceil_div(plan.row_spans, kWarps);
  const int64_t wanted = std::clamp<int64_t>(ceil_div(int64_t{16} * processors, rows), 1, most);
  plan.split_spans = ceil_div(ceil_div(plan.row_spans, wanted), kWarps) * kWarps;
  plan.splits = ceil_div(plan.row_spans, plan.split_spans);
  plan.blocks = p.batch * plan.splits;
  plan.tickets = p.batch * (1 + p.beams);

  plan.chosen_limit = std::min(plan.row_chunks, p.k + p.k / 8);
  plan.capacity = power_of_two(p.k <= kSharedCandidates / 2
                                   ? std::clamp<int64_t>(4 * p.k, 512, kSharedCandidates)
                                   : 2 * p.k);
  // Few spans are read as fast whole: a round of loads is four spans for each thread.
  plan.lists_spans = plan.row_spans > std::max<int64_t>(4 * kThreads, 2 * plan.chosen_limit) &&
                     plan.chosen_limit <= kSharedSpans;
  plan.shared_chosen = plan.chosen_limit <= kSharedChosen;
  plan.shared_candidates = plan.capacity <= kSharedCandidates;
  plan.layout = lay_out(plan, p);
  plan.workspace_bytes = plan.layout.ticket_bytes + p.batch * plan.layout.row_bytes;

  const beam::Plan cost = beam::plan_topk(p, 1);
  plan.read_bytes = cost.read_bytes;
  plan.write_bytes = cost.write_bytes;
  plan.flops = cost.flops;
  return plan;
}

}  // namespace flashkern::beam::sm80
