// Exact selection: the k-th greatest of a list, the candidates that a threshold leaves, the sorted
// best.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include "beam/score.h"
#include "simd/vec.h"

namespace flashkern::FK_ISA::topk {

using beam::Candidate;
using beam::Normaliser;

// The k-th greatest (k from 1) of some numbers. Each round spreads the range that is left over 1024
// bins and keeps the bin that holds the answer: one round for most lists, three at worst, whatever
// the values.
inline uint32_t kth_greatest(std::vector<uint32_t> values, int64_t k) {
  constexpr int kBits = 10;
  for (;;) {
    const auto [low, high] = std::minmax_element(values.begin(), values.end());
    const uint32_t least = *low, range = *high - least;
    if (range == 0) return least;
    const int shift = std::max(0, static_cast<int>(std::bit_width(range)) - kBits);
    uint32_t counts[1 << kBits] = {};
    for (const uint32_t value : values) ++counts[(value - least) >> shift];
    uint32_t bin = range >> shift;
    for (; counts[bin] < k; --bin) k -= counts[bin];
    if (shift == 0) return least + bin;
    size_t kept = 0;
    for (const uint32_t value : values) {
      values[kept] = value;
      kept += (value - least) >> shift == bin;
    }
    values.resize(kept);
  }
}

// What passes: every score above the threshold; of those equal to it the first `ties`.
struct Threshold {
  uint32_t ordered = 0;
  int64_t ties = 0;

  bool passes(uint32_t best) const { return best > ordered || (best == ordered && ties > 0); }
};

inline uint32_t kth_greatest(const Candidate* candidates, int64_t n, int64_t k) {
  std::vector<uint32_t> values(n);
  for (int64_t i = 0; i < n; ++i) values[i] = beam::ordered_of(candidates[i]);
  return kth_greatest(std::move(values), k);
}

// Keeps the k best of n > k candidates in flat order, in that order, and returns the score of the
// last.
inline uint32_t keep_best(Candidate* candidates, int64_t n, int64_t k) {
  const uint32_t last = kth_greatest(candidates, n, k);
  int64_t ties = k, kept = 0;
  for (int64_t i = 0; i < n; ++i) ties -= beam::ordered_of(candidates[i]) > last;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t value = beam::ordered_of(candidates[i]);
    if (value > last || (value == last && ties-- > 0)) candidates[kept++] = candidates[i];
  }
  return last;
}

// Candidates in ascending flat order. When the room runs out, the k best stay and the threshold
// rises to the last of them, which no later candidate beats by being equal.
struct Candidates {
  std::unique_ptr<Candidate[]> data;
  int64_t count = 0, room = 0;

  void reserve(int64_t most) {
    room = most;
    data.reset(new Candidate[most]);
  }
  void make_room(int64_t wanted, int64_t k, Threshold& threshold) {
    if (count + wanted <= room) return;
    threshold = {keep_best(data.get(), count, k), 0};
    count = k;
  }
  void add(uint32_t ordered, int64_t flat_index) {
    data[count++] = beam::candidate(ordered, static_cast<uint32_t>(flat_index));
  }
};

// A logit below which no score reaches `lowest`: less by more than all its roundings could take
// away. NaN, which nothing is below, where that cannot be told.
inline float least_logit(const Normaliser& n, float lowest) {
  const float size = std::fabs(n.shift) + std::fabs(n.log_sum) + std::fabs(n.beam_score);
  return n.shift + n.log_sum - n.beam_score + lowest - 1e-6f * (size + std::fabs(lowest));
}

// Adds the candidates among some logits in flat order. `index_of(i)`: logit i's flat index, or -1
// where it is not allowed; asked of those alone whose score passes. Most logits are too low by far:
// they are compared, four vectors at once, and not scored.
template <class T, class Index>
void gather_chunk(const T* logits, int64_t count, const Normaliser& n, Threshold& threshold,
                  Candidates& out, Index&& index_of) {
  const auto consider = [&](int64_t i) {
    const uint32_t value = beam::ordered(beam::score(to_float(logits[i]), n));
    if (value < threshold.ordered) return;
    const int64_t index = index_of(i);
    if (index < 0) return;
    if (value == threshold.ordered && threshold.ties-- <= 0) return;
    out.add(value, index);
  };
  const float lowest_score = beam::score_of(threshold.ordered);
  const VecF lowest = broadcast(lowest_score), least = broadcast(least_logit(n, lowest_score));
  const VecF shift = broadcast(n.shift), log_sum = broadcast(n.log_sum);
  const VecF beam_score = broadcast(n.beam_score), masked = broadcast(-kInf);
  const bool strict = threshold.ties <= 0;
  const auto consider_vector = [&](int64_t i) {
    const VecF x = load(logits + i);
    const VecF s = x == masked ? masked : beam::score(x, shift, log_sum, beam_score);
    // Not below, rather than above: NaN passes, and `consider` decides.
    const VecI below = strict ? s <= lowest : s < lowest;
    for (uint32_t rest = bits(~below); rest != 0; rest &= rest - 1) {
      consider(i + __builtin_ctz(rest));
    }
  };
  constexpr int kAtOnce = 4;
  int64_t i = 0;
  for (; i + kAtOnce * kLanes <= count; i += kAtOnce * kLanes) {
    VecI below = load(logits + i) < least;
    for (int v = 1; v < kAtOnce; ++v) below &= load(logits + i + v * kLanes) < least;
    if (!any(~below)) continue;
    for (int v = 0; v < kAtOnce; ++v) consider_vector(i + v * kLanes);
  }
  for (; i + kLanes <= count; i += kLanes) consider_vector(i);
  for (; i < count; ++i) consider(i);
}

// The k best of all the lists' candidates, or all, best first. The lists are in flat order one
// after the other.
inline std::vector<Candidate> best(const std::vector<Candidates>& lists, int64_t k) {
  std::vector<Candidate> all;
  int64_t total = 0;
  for (const auto& list : lists) total += list.count;
  all.reserve(total);
  for (const auto& list : lists)
    all.insert(all.end(), list.data.get(), list.data.get() + list.count);
  if (total > k) {
    keep_best(all.data(), total, k);
    all.resize(k);
  }
  std::sort(all.begin(), all.end(), std::greater<>());
  return all;
}

}  // namespace flashkern::FK_ISA::topk
