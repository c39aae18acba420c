// The k best continuations of every batch row's beams: log-softmax, beam scores and top-k in one
// read.
//
//   scan     every (beam, slice of its vocabulary), in parallel: each chunk's greatest logit and
//   its sum of
//            exponentials (scan.h). The only pass over all the logits.
//   rank     each batch row: the beams' log-sum-exp; the best score of each chunk; the k-th best of
//   these
//            over all beams is the threshold: k different candidates reach it, so no lower one is
//            needed.
//   gather   the chunks whose best score reaches the threshold (about k of them) give the
//   candidates that do choose   the exact k best of these, sorted
//
//   logits   beam 0 |chunk|chunk|chunk|chunk|...   scan task = a slice of 32 chunks
//            beam 1 |chunk|chunk|chunk|chunk|...   gather task = a run of chunks, over beams
//
// Memory: two floats for each chunk, a candidate list. More than (k - 1) chunks never lie strictly
// above the threshold, and scores equal to it are taken in flat order up to k, so the list stays
// below k * (chunk + 1) whatever the values are: ascending logits, or all of them equal.
//
// Numerics and order: beam/score.h. A choice does not depend on the cut into tasks.
//
// Papers: Milakov and Gimelshein (arXiv 1805.02867), one pass for softmax and top-k; Gaihre et al.,
// Dr. Top-k (arXiv 2109.08219), selection through the maxima of subranges.
#include <cmath>

#include "beam/cpu/scan.h"
#include "beam/cpu/select.h"
#include "beam/kernels.h"

namespace flashkern::FK_ISA {

using beam::kSlice;
using beam::Plan;
using beam::TopkParams;

namespace topk {
namespace {

template <class T>
class Topk {
 public:
  Topk(const TopkParams& params, const Threads& threads)
      : p(params), plan(plan_topk(params, threads.count)), threads(threads) {
    this->threads.count = plan.workers;
    const int64_t stats = p.batch * p.beams * plan.padded_chunks;
    greatest.reset(new float[stats]);
    sums.reset(new float[stats]);
    rows.resize(p.batch);
  }

  void run() {
    threads.run(p.batch * p.beams * plan.slices,
                [&](int64_t task, int) { scan(task / plan.slices, task % plan.slices); });
    threads.run(p.batch, [&](int64_t row, int) { rank(row); });
    threads.run(p.batch * plan.segments,
                [&](int64_t task, int) { gather(task / plan.segments, task % plan.segments); });
    threads.run(p.batch, [&](int64_t row, int) { choose(row); });
  }

 private:
  struct Row {
    std::vector<Normaliser> beams;
    std::vector<uint32_t> chunk_best;  // (beams, chunks), ordered scores
    uint32_t threshold = 0;            // 0: every element is a candidate
    std::vector<Candidates> segments;
  };

  const T* beam_logits(int64_t beam) const {  // counted over the whole batch
    return static_cast<const T*>(p.logits) + beam / p.beams * p.batch_stride +
           beam % p.beams * p.beam_stride;
  }

  void scan(int64_t beam, int64_t slice) {
    const T* logits = beam_logits(beam);
    float* top = greatest.get() + beam * plan.padded_chunks;
    float* sum = sums.get() + beam * plan.padded_chunks;
    const int64_t end = std::min(p.vocab, (slice + 1) * kSlice);
    int64_t chunk = slice * (kSlice / kChunk);
    for (int64_t i = slice * kSlice; i < end; i += kChunk, ++chunk) {
      const ChunkStats stats =
          scan_chunk(logits + i, std::min(kChunk, end - i), p.given_logsumexp == nullptr);
      top[chunk] = stats.greatest;
      sum[chunk] = stats.sum;
    }
    if (slice + 1 == plan.slices) {
      std::fill(top + plan.chunks, top + plan.padded_chunks, -kInf);
      std::fill(sum + plan.chunks, sum + plan.padded_chunks, 0.f);
    }
  }

  // The log-sum-exp of a beam from its chunks.
  Normaliser normaliser(int64_t beam) const {
    const float beam_score = p.beam_scores[beam];
    if (p.given_logsumexp != nullptr) {
      p.logsumexp[beam] = p.given_logsumexp[beam];
      return {p.given_logsumexp[beam], 0.f, beam_score};
    }
    const float* top = greatest.get() + beam * plan.padded_chunks;
    const float* sum = sums.get() + beam * plan.padded_chunks;
    const float shift = chunk_max(top, plan.padded_chunks);
    if (shift == -kInf && !chunk_has_nan(top, plan.padded_chunks)) {
      p.logsumexp[beam] = -kInf;
      return {0.f, 0.f, beam_score};
    }
    Group total(0.f);
    for (int64_t c = 0; c < plan.padded_chunks; c += kGroup) {
      for (int j = 0; j < kVecs; ++j) {
        const int64_t at = c + j * kLanes;
        total.v[j] = add_exp(total.v[j], load(top + at) - shift, load(sum + at));
      }
    }
    const double log_sum = std::log(static_cast<double>(reduce_add(total.added())));
    p.logsumexp[beam] = static_cast<float>(shift + log_sum);
    return {shift, static_cast<float>(log_sum), beam_score};
  }

  void rank(int64_t r) {
    Row& row = rows[r];
    row.beams.resize(p.beams);
    row.chunk_best.resize(p.beams * plan.chunks);
    row.segments.resize(plan.segments);
    for (int64_t b = 0; b < p.beams; ++b) {
      const int64_t beam = r * p.beams + b;
      row.beams[b] = normaliser(beam);
      const float* top = greatest.get() + beam * plan.padded_chunks;
      for (int64_t c = 0; c < plan.chunks; ++c) {
        row.chunk_best[b * plan.chunks + c] = beam::ordered(beam::score(top[c], row.beams[b]));
      }
    }
    const int64_t chunks = p.beams * plan.chunks;
    if (chunks >= p.k) {
      row.threshold = kth_greatest(row.chunk_best, p.k);
    }
  }

  void gather(int64_t r, int64_t segment) {
    Row& row = rows[r];
    Candidates& out = row.segments[segment];
    const int64_t chunks = p.beams * plan.chunks;
    const int64_t begin = chunks * segment / plan.segments;
    const int64_t end = chunks * (segment + 1) / plan.segments;
    int64_t above = 0;
    for (int64_t i = begin; i < end; ++i) above += row.chunk_best[i] > row.threshold;
    // The room that all could need, or enough that raising the threshold is rare.
    out.reserve(std::min(above * kChunk + p.k, 4 * p.k + 8 * kChunk) + kChunk);
    Threshold threshold{row.threshold, p.k};
    for (int64_t i = begin; i < end; ++i) {
      const bool tie = row.chunk_best[i] == row.threshold && threshold.ties > 0;
      if (row.chunk_best[i] <= row.threshold && !tie) continue;
      out.make_room(kChunk, p.k, threshold);
      const int64_t b = i / plan.chunks, first = i % plan.chunks * kChunk;
      gather_chunk(beam_logits(r * p.beams + b) + first, std::min(kChunk, p.vocab - first),
                   b * p.vocab + first, row.beams[b], threshold, out);
    }
  }

  void choose(int64_t r) {
    const std::vector<Candidate> chosen = best(rows[r].segments, p.k);
    for (int64_t i = 0; i < p.k; ++i) {
      const uint32_t index = beam::index_of(chosen[i]);
      p.scores[r * p.k + i] = beam::score_of(beam::ordered_of(chosen[i]));
      p.parents[r * p.k + i] = index / p.vocab;
      p.tokens[r * p.k + i] = index % p.vocab;
    }
    rows[r] = Row();
  }

  const TopkParams& p;
  const Plan plan;
  Threads threads;
  std::unique_ptr<float[]> greatest, sums;  // (batch * beams, padded chunks)
  std::vector<Row> rows;
};

}  // namespace
}  // namespace topk

void beam_topk(const TopkParams& p, const Threads& threads) {
  switch (p.dtype) {
    case DType::kBFloat16:
      return topk::Topk<BFloat16>(p, threads).run();
    case DType::kFloat16:
      return topk::Topk<Half>(p, threads).run();
    default:
      return topk::Topk<float>(p, threads).run();
  }
}

}  // namespace flashkern::FK_ISA
