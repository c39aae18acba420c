// Exact selection: the k-th greatest of a list, the candidates that a threshold leaves, the sorted
// best.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "beam/score.h"
#include "simd/vec.h"

namespace flashkern::FK_ISA::topk {

using beam::Candidate;
using beam::Normaliser;

// The k-th greatest (k from 1) of n numbers get(i): a radix select from the top digit down, 11 + 11
// + 10 bits. It reads the list three times and writes nothing, whatever the values are.
template <class Get>
uint32_t kth_greatest(int64_t n, int64_t k, Get get) {
  uint32_t prefix = 0, known = 0;  // the digits found so far, and which bits they are
  for (const int shift : {21, 10, 0}) {
    const uint32_t digit_mask = shift == 0 ? 0x3ffu : 0x7ffu;
    uint32_t counts[2][2048] = {};  // two, so that equal neighbours do not wait for each other
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t value = get(i);
      if ((value & known) == prefix) ++counts[i & 1][value >> shift & digit_mask];
    }
    uint32_t digit = digit_mask;
    for (;; --digit) {
      const int64_t here = static_cast<int64_t>(counts[0][digit]) + counts[1][digit];
      if (here >= k) break;
      k -= here;
    }
    prefix |= digit << shift;
    known |= digit_mask << shift;
  }
  return prefix;
}

// Candidates in ascending flat order, in room reserved once.
struct Candidates {
  std::unique_ptr<Candidate[]> data;
  int64_t count = 0;

  void reserve(int64_t most) { data.reset(new Candidate[most]); }
  void add(uint32_t ordered, int64_t flat_index) {
    data[count++] = beam::candidate(ordered, static_cast<uint32_t>(flat_index));
  }
};

// What passes: every score above the threshold; of those equal to it the first `ties`.
struct Threshold {
  uint32_t ordered = 0;
  int64_t ties = 0;
};

// Adds the candidates of one chunk; `first` is the flat index of its first element.
template <class T>
void gather_chunk(const T* logits, int64_t count, int64_t first, const Normaliser& n,
                  Threshold& threshold, Candidates& out) {
  const auto consider = [&](float logit, int64_t i) {
    const uint32_t value = beam::ordered(beam::score(logit, n));
    if (value < threshold.ordered) return;
    if (value == threshold.ordered && threshold.ties-- <= 0) return;
    out.add(value, first + i);
  };
  const VecF shift = broadcast(n.shift), log_sum = broadcast(n.log_sum);
  const VecF beam_score = broadcast(n.beam_score), masked = broadcast(-kInf);
  const VecF lowest = broadcast(beam::score_of(threshold.ordered));
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const VecF x = load(logits + i);
    const VecF s = x == masked ? masked : beam::score(x, shift, log_sum, beam_score);
    // Not below, rather than above: NaN passes, and `consider` decides.
    for (uint32_t rest = bits(~(s < lowest)); rest != 0; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      consider(to_float(logits[i + lane]), i + lane);
    }
  }
  for (; i < count; ++i) consider(to_float(logits[i]), i);
}

// The k best of all the lists' candidates, best first. The lists are in flat order one after the
// other.
inline std::vector<Candidate> best(const std::vector<Candidates>& lists, int64_t k) {
  std::vector<Candidate> all;
  int64_t total = 0;
  for (const auto& list : lists) total += list.count;
  all.reserve(total);
  for (const auto& list : lists)
    all.insert(all.end(), list.data.get(), list.data.get() + list.count);
  if (total > k) {
    const uint32_t last =
        kth_greatest(total, k, [&](int64_t i) { return beam::ordered_of(all[i]); });
    int64_t above = 0;
    for (const Candidate c : all) above += beam::ordered_of(c) > last;
    int64_t kept = 0, ties = k - above;
    for (const Candidate c : all) {
      const uint32_t value = beam::ordered_of(c);
      if (value > last || (value == last && ties-- > 0)) all[kept++] = c;
    }
    all.resize(k);
  }
  std::sort(all.begin(), all.end(), std::greater<>());
  return all;
}

}  // namespace flashkern::FK_ISA::topk
