// The pass over the logits: a warp's span of chunks gives each chunk's greatest logit and the
// span's (greatest, sum of exp(logit - greatest)).
//
// A chunk is in registers when its maximum is known (one redux over the warp), so exponentials are
// taken against the span's running maximum and sums are rescaled once for each chunk. The next
// chunk is under way meanwhile.
#pragma once

#include "beam/sm80/load.h"

namespace flashkern::beam::sm80 {

inline constexpr float kLog2E = 1.44269504f;

// e^x for x <= 0: 2 ulp of ex2, plus x's rounding in units of log2.
FK_DEVICE float exp_below(float x) { return ptx::fast_exp2(x * kLog2E); }

// What exponentials of logits up to `greatest` are taken against: never -inf.
FK_DEVICE float reference(float greatest) { return greatest == -kInfinity ? 0.f : greatest; }

FK_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(ptx::kAllLanes, x, lanes);
  return x;
}

struct SpanSum {
  float greatest = -kInfinity;  // the warp's
  float sum = 0.f;              // this lane's

  template <class T>
  FK_DEVICE float add(const Chunk<T>& chunk, float chunk_greatest) {
    const float raised = fmaxf(greatest, chunk_greatest), against = reference(raised);
    float part = 0.f;
    each_element(chunk, [&](float x, uint32_t) { part += exp_below(x - against); });
    sum = sum * exp_below(greatest - against) + part;
    greatest = raised;
    return part;
  }
};

// The warp's greatest, ordered, NaN passed over.
template <class T>
FK_DEVICE uint32_t chunk_max(const Chunk<T>& chunk) {
  float greatest = -kInfinity;
  each_element(chunk, [&](float x, uint32_t) { greatest = fmaxf(greatest, x); });
  return __reduce_max_sync(ptx::kAllLanes, ordered(greatest));
}

// The warp's greatest of the elements in the mask, ordered, NaN above all; 0 where there is none.
template <class T>
FK_DEVICE uint32_t greatest_allowed(const Chunk<T>& chunk, uint32_t mask) {
  uint32_t greatest = 0;
  each_element(chunk, mask, [&](float x, uint32_t) { greatest = max(greatest, ordered(x)); });
  return __reduce_max_sync(ptx::kAllLanes, greatest);
}

// The span of chunks [begin, end) of a beam. Lane i gets the maximum of its chunk i, ordered, of
// the elements in masks(chunk); 0 where there is no chunk. Without constraints, a chunk that holds
// NaN, or +inf where sums are wanted, has the maximum NaN: so has every score of such a beam but
// those of -inf.
template <bool kConstrained, class T, class Masks>
FK_DEVICE uint32_t scan_span(const T* row, int64_t vocab, uint32_t begin, uint32_t end,
                             bool want_sum, const Masks& masks, SpanSum& total) {
  uint32_t own = 0;
  Chunk<T> chunk, next;
  load_chunk(next, row, begin, vocab);
  for (uint32_t i = begin; i < end; ++i) {
    chunk = next;
    if (i + 1 < end) load_chunk(next, row, i + 1, vocab);
    uint32_t best = chunk_max(chunk);
    float probe = 0.f;  // NaN where a logit is
    if (want_sum) {
      probe = total.add(chunk, score_of(best));
    } else {
      each_element(chunk, [&](float x, uint32_t) { probe = x != x ? x : probe; });
    }
    if constexpr (kConstrained) {
      best = greatest_allowed(chunk, masks(i));
    } else {
      const bool bad = __any_sync(ptx::kAllLanes, probe != probe);
      if (bad) best = ordered(kNaN);
    }
    if (ptx::lane_id() == i - begin) own = best;
  }
  return own;
}

// The maxima alone: of a chunk in which nothing is allowed no logit is read.
template <class T, class Masks>
FK_DEVICE uint32_t scan_allowed(const T* row, int64_t vocab, uint32_t begin, uint32_t end,
                                const Masks& masks) {
  uint32_t own = 0;
  for (uint32_t i = begin; i < end; ++i) {
    const uint32_t mask = masks(i);
    const bool something = __any_sync(ptx::kAllLanes, mask != 0);
    if (!something) continue;
    Chunk<T> chunk;
    load_chunk(chunk, row, i, vocab);
    const uint32_t best = greatest_allowed(chunk, mask);
    if (ptx::lane_id() == i - begin) own = best;
  }
  return own;
}

// A beam's log-sum-exp from its spans, by one warp.
FK_DEVICE Normaliser normaliser(const float2* spans, uint32_t count, float beam_score,
                                float& logsumexp) {
  float greatest = -kInfinity;
  for (uint32_t i = ptx::lane_id(); i < count; i += 32) greatest = fmaxf(greatest, spans[i].x);
  greatest = score_of(__reduce_max_sync(ptx::kAllLanes, ordered(greatest)));
  const float shift = reference(greatest);
  float sum = 0.f;
  for (uint32_t i = ptx::lane_id(); i < count; i += 32) {
    sum += spans[i].y * exp_below(spans[i].x - shift);
  }
  sum = warp_sum(sum);
  if (greatest == -kInfinity && sum == 0.f) {
    logsumexp = -kInfinity;
    return {0.f, 0.f, beam_score};
  }
  const double log_sum = log(static_cast<double>(sum));
  logsumexp = static_cast<float>(shift + log_sum);
  return {shift, static_cast<float>(log_sum), beam_score};
}

}  // namespace flashkern::beam::sm80
