// The k best continuations of every batch row's beams: log-softmax, beam scores and top-k in one
// read.
//
//   scan     every (beam, slice of its vocabulary), in parallel: each chunk's greatest logit and
//            the slice's sum of exponentials (scan.h). The only pass over all the logits.
//   rank     each batch row: the beams' log-sum-exp; the best score of each chunk; the k-th best of
//            these over all beams is the threshold: k different candidates reach it, so no lower
//            one is needed.
//   gather   the chunks whose best score reaches the threshold (about k of them) give the
//            candidates that do
//   choose   the exact k best of these, sorted
//
//   logits   beam 0 |chunk|chunk|chunk|chunk|...   scan task = a slice of 32 chunks
//            beam 1 |chunk|chunk|chunk|chunk|...   gather task = a run of chunks, over beams
//
// Memory: a float for each chunk, two for each slice, a candidate list. More than (k - 1) chunks
// never lie strictly above the threshold, and scores equal to it are taken in flat order up to k,
// so the list stays below k * (chunk + 1) whatever the values are: ascending logits, or all of them
// equal.
//
// Constraints (beam/params.h): excluded tokens leave their chunk before it is ranked (a second
// number for each chunk), and are passed over when it gives its candidates. With a trie the
// children of the beams' nodes are the candidates. Where they are few the scan picks their logits,
// and all are scored; where they are many their chunks bound them, and where they are all the
// tokens there are (a root) those chunks make a threshold as without a trie.
//
// Numerics and order: beam/score.h. A choice does not depend on the cut into tasks.
//
// Papers: Milakov and Gimelshein (arXiv 1805.02867), one pass for softmax and top-k; Gaihre et al.,
// Dr. Top-k (arXiv 2109.08219), selection through the maxima of subranges.
#include <cmath>

#include "beam/cpu/constraints.h"
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
      : p(params),
        plan(plan_topk(params, threads.count)),
        threads(threads),
        excluded(params.constraints, params.batch * params.beams),
        children(children_of_all(params.constraints, params.batch * params.beams)) {
    this->threads.count = plan.workers;
    const int64_t beams = p.batch * p.beams;
    greatest.reset(new float[beams * plan.padded_chunks]);
    references.reset(new float[beams * plan.padded_slices]);
    sums.reset(new float[beams * plan.padded_slices]);
    if (excluded.any()) allowed.reset(new uint32_t[beams * plan.padded_chunks]);
    if (by_trie() && has_stats()) make_room_for_children();
    rows.resize(p.batch);
  }

  void run() {
    if (excluded.any()) {
      threads.run(p.batch * p.beams, [&](int64_t beam, int) { excluded.sort(beam); });
    }
    if (has_stats()) {
      threads.run(p.batch * p.beams * plan.slices,
                  [&](int64_t task, int) { scan(task / plan.slices, task % plan.slices); });
    }
    threads.run(p.batch, [&](int64_t row, int) { rank(row); });
    threads.run(p.batch * plan.segments, [&](int64_t task, int) {
      const int64_t row = task / plan.segments, segment = task % plan.segments;
      by_trie() ? gather_by_trie(row, segment) : gather(row, segment);
    });
    threads.run(p.batch, [&](int64_t row, int) { choose(row); });
  }

 private:
  struct Row {
    std::vector<Normaliser> beams;
    std::vector<uint32_t> chunk_best;  // (beams, chunks), ordered scores, where by_chunks()
    uint32_t threshold = 0;            // 0: every element is a candidate
    std::vector<Candidates> segments;
  };

  bool by_trie() const { return p.constraints.nodes != nullptr; }
  // Of chunks: children alone need none where the log-sum-exp is given.
  bool has_stats() const { return !by_trie() || p.given_logsumexp == nullptr; }
  bool takes_all(int64_t beam) const { return !by_trie() || children[beam].count == p.vocab; }
  // Whether a beam's chunks are ranked: not where it has so few children that all are looked at.
  bool by_chunks(int64_t beam) const {
    return has_stats() && (!by_trie() || children[beam].count >= kChunk / 8 * plan.chunks);
  }

  const T* beam_logits(int64_t beam) const {  // counted over the whole batch
    return static_cast<const T*>(p.logits) + beam / p.beams * p.batch_stride +
           beam % p.beams * p.beam_stride;
  }

  void scan(int64_t beam, int64_t slice) {
    const T* logits = beam_logits(beam);
    const int64_t begin = slice * kSlice, end = std::min(p.vocab, begin + kSlice);
    int64_t chunk = beam * plan.padded_chunks + begin / kChunk;
    Tokens without = between(excluded.of(beam), begin, end);
    Scan sum;
    for (int64_t i = begin; i < end; i += kChunk, ++chunk) {
      const int64_t count = std::min(kChunk, end - i);
      const bool summed = p.given_logsumexp == nullptr;
      greatest[chunk] = summed ? sum.chunk(logits + i, count) : greatest_of(logits + i, count);
      if (allowed == nullptr) continue;
      size_t own = 0;
      while (own < without.size() && without[own] < i + count) ++own;
      allowed[chunk] = greatest_without(without.first(own), logits + i, count, i, greatest[chunk]);
      without = without.subspan(own);
    }
    references[beam * plan.padded_slices + slice] = sum.reference();
    sums[beam * plan.padded_slices + slice] = sum.sum();
    if (picked != nullptr) pick_children(beam, begin, end);
    if (slice + 1 == plan.slices) fill_up(beam);
  }

  // Behind a beam's statistics, what changes nothing.
  void fill_up(int64_t beam) {
    const int64_t chunks = beam * plan.padded_chunks, slices = beam * plan.padded_slices;
    const auto fill = [](float* all, int64_t count, int64_t padded, float value) {
      std::fill(all + count, all + padded, value);
    };
    fill(greatest.get() + chunks, plan.chunks, plan.padded_chunks, -kInf);
    fill(references.get() + slices, plan.slices, plan.padded_slices, -kInf);
    fill(sums.get() + slices, plan.slices, plan.padded_slices, 0.f);
  }

  void make_room_for_children() {
    places.assign(children.size() + 1, 0);
    for (size_t beam = 0; beam < children.size(); ++beam) {
      places[beam + 1] = places[beam] + (by_chunks(beam) ? 0 : children[beam].count);
    }
    picked.reset(new float[places.back()]);
  }

  // Of a slice just scanned: from the cache, where a later step would wait for each logit.
  void pick_children(int64_t beam, int64_t begin, int64_t end) {
    if (by_chunks(beam)) return;
    const beam::Children& all = children[beam];
    const beam::Children own = plan.slices == 1 ? all : between(all, begin, end);
    float* to = picked.get() + places[beam] + (own.tokens - all.tokens);
    topk::pick(beam_logits(beam), p.vocab, own, to);
  }

  // The log-sum-exp of a beam from its slices.
  Normaliser normaliser(int64_t beam) const {
    const float beam_score = p.beam_scores[beam];
    if (p.given_logsumexp != nullptr) {
      p.logsumexp[beam] = p.given_logsumexp[beam];
      return {p.given_logsumexp[beam], 0.f, beam_score};
    }
    const float* top = greatest.get() + beam * plan.padded_chunks;
    const float shift = max_of(top, plan.padded_chunks);
    if (shift == -kInf && !has_nan(top, plan.padded_chunks)) {
      p.logsumexp[beam] = -kInf;
      return {0.f, 0.f, beam_score};
    }
    const float* reference = references.get() + beam * plan.padded_slices;
    const float* sum = sums.get() + beam * plan.padded_slices;
    Group total(0.f);
    for (int64_t s = 0; s < plan.padded_slices; s += kGroup) {
      for (int j = 0; j < kVecs; j += 2) {
        VecF from[2], weight[2];
        load_two(reference + s, j / 2, from[0], from[1]);
        load_two(sum + s, j / 2, weight[0], weight[1]);
        for (int i = 0; i < 2; ++i) {
          total.v[j + i] = add_exp(total.v[j + i], from[i] - shift, weight[i]);
        }
      }
    }
    const double log_sum = std::log(static_cast<double>(reduce_add(total.added())));
    p.logsumexp[beam] = static_cast<float>(shift + log_sum);
    return {shift, static_cast<float>(log_sum), beam_score};
  }

  // The best score of each of a beam's chunks, ordered; 0 where a chunk has no candidate.
  void rank_chunks(int64_t beam, const Normaliser& n, uint32_t* best) const {
    const int64_t at = beam * plan.padded_chunks;
    for (int64_t c = 0; allowed == nullptr && c < plan.chunks; ++c) {
      best[c] = beam::ordered(beam::score(greatest[at + c], n));
    }
    for (int64_t c = 0; allowed != nullptr && c < plan.chunks; ++c) {
      const float logit = beam::score_of(allowed[at + c]);
      best[c] = allowed[at + c] == 0 ? 0 : beam::ordered(beam::score(logit, n));
    }
  }

  void rank(int64_t r) {
    Row& row = rows[r];
    row.beams.resize(p.beams);
    row.chunk_best.resize(p.beams * plan.chunks);
    row.segments.resize(plan.segments);
    std::vector<uint32_t> reached;  // by one candidate each
    for (int64_t b = 0; b < p.beams; ++b) {
      const int64_t beam = r * p.beams + b;
      row.beams[b] = normaliser(beam);
      if (!by_chunks(beam)) continue;
      uint32_t* best = row.chunk_best.data() + b * plan.chunks;
      rank_chunks(beam, row.beams[b], best);
      if (takes_all(beam)) reached.insert(reached.end(), best, best + plan.chunks);
    }
    if (static_cast<int64_t>(reached.size()) >= p.k) {
      row.threshold = kth_greatest(std::move(reached), p.k);
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
      if (!threshold.passes(row.chunk_best[i])) continue;
      out.make_room(kChunk, p.k, threshold);
      gather_whole(r * p.beams + i / plan.chunks, i % plan.chunks, threshold, out);
    }
  }

  void gather_whole(int64_t beam, int64_t chunk, Threshold& threshold, Candidates& out) {
    const int64_t b = beam % p.beams, first = chunk * kChunk, flat = b * p.vocab + first;
    const Tokens without = excluded.of(beam);
    gather_chunk(beam_logits(beam) + first, std::min(kChunk, p.vocab - first),
                 rows[beam / p.beams].beams[b], threshold, out,
                 [&](int64_t j) { return holds(without, first + j) ? -1 : flat + j; });
  }

  // The same of the children of a run of beams. Little room: the threshold rises early.
  void gather_by_trie(int64_t r, int64_t segment) {
    Candidates& out = rows[r].segments[segment];
    const int64_t begin = r * p.beams + p.beams * segment / plan.segments;
    const int64_t end = r * p.beams + p.beams * (segment + 1) / plan.segments;
    int64_t most = 0;
    for (int64_t beam = begin; beam < end; ++beam) most += children[beam].count;
    out.reserve(std::min(most, 2 * p.k + kChunk) + kChunk);
    Threshold threshold{rows[r].threshold, p.k};
    for (int64_t beam = begin; beam < end; ++beam) {
      if (by_chunks(beam)) {
        gather_by_chunks(beam, threshold, out);
        continue;
      }
      const beam::Children& all = children[beam];
      for (int64_t i = 0; i < all.count; i += kChunk) {
        const float* logits = picked == nullptr ? nullptr : picked.get() + places[beam] + i;
        const beam::Children some{all.tokens + i, std::min(kChunk, all.count - i)};
        gather_some(beam, some, logits, threshold, out);
      }
    }
  }

  // A chunk's best score bounds that of the children in it.
  void gather_by_chunks(int64_t beam, Threshold& threshold, Candidates& out) {
    const uint32_t* best = rows[beam / p.beams].chunk_best.data() + beam % p.beams * plan.chunks;
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      if (!threshold.passes(best[chunk])) continue;
      if (takes_all(beam)) {
        out.make_room(kChunk, p.k, threshold);
        gather_whole(beam, chunk, threshold, out);
      } else {
        const int64_t first = chunk * kChunk;
        const beam::Children some = between(children[beam], first, first + kChunk);
        gather_some(beam, some, nullptr, threshold, out);
      }
    }
  }

  // At most kChunk children, and their logits where the scan has picked them.
  void gather_some(int64_t beam, const beam::Children& some, const float* logits,
                   Threshold& threshold, Candidates& out) {
    float own[kChunk];
    if (logits == nullptr) {
      topk::pick(beam_logits(beam), p.vocab, some, own);
      logits = own;
    }
    out.make_room(kChunk, p.k, threshold);
    const int64_t b = beam % p.beams;
    gather_children(some, logits, p.vocab, b * p.vocab, excluded.of(beam),
                    rows[beam / p.beams].beams[b], threshold, out);
  }

  void choose(int64_t r) {
    const std::vector<Candidate> chosen = best(rows[r].segments, p.k);
    const int64_t count = chosen.size();
    for (int64_t i = 0; i < p.k; ++i) put(p, r * p.k + i, i < count ? chosen[i] : beam::kNobody);
    rows[r] = Row();
  }

  const TopkParams& p;
  const Plan plan;
  Threads threads;
  Excluded excluded;
  std::vector<beam::Children> children;
  std::vector<int64_t> places;  // of a beam's children in `picked`
  std::unique_ptr<float[]> picked;
  std::unique_ptr<float[]> greatest;          // (batch * beams, padded chunks)
  std::unique_ptr<uint32_t[]> allowed;        // the same: of those not excluded, ordered
  std::unique_ptr<float[]> references, sums;  // (batch * beams, padded slices)
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
