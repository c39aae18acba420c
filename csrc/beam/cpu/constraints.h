// Constraints on the CPU. Excluded tokens leave a chunk before its greatest logit is taken for the
// threshold: else k chunks above it would not promise k candidates. A trie needs no threshold: its
// children are few, and are scored one list after the other.
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "beam/constraints.h"
#include "beam/cpu/scan.h"
#include "beam/cpu/select.h"

namespace flashkern::FK_ISA::topk {

// Tokens in ascending order, each once.
using Tokens = std::span<const int64_t>;

inline Tokens between(Tokens tokens, int64_t begin, int64_t end) {
  const auto first = std::lower_bound(tokens.begin(), tokens.end(), begin);
  return {first, std::lower_bound(first, tokens.end(), end)};
}

inline bool holds(Tokens tokens, int64_t token) {
  return !tokens.empty() && std::binary_search(tokens.begin(), tokens.end(), token);
}

// The excluded tokens of every beam; of none where there is no such constraint.
class Excluded {
 public:
  Excluded(const beam::Constraints& c, int64_t beams)
      : given(c.excluded), width(c.excluded == nullptr ? 0 : c.excluded_count) {
    tokens.resize(beams * width);
    counts.resize(beams);
  }
  bool any() const { return width > 0; }
  void sort(int64_t beam) {
    const auto first = tokens.begin() + beam * width;
    std::copy(given + beam * width, given + (beam + 1) * width, first);
    std::sort(first, first + width);
    counts[beam] = std::unique(first, first + width) - first;
  }
  Tokens of(int64_t beam) const {
    return {tokens.data() + beam * width, static_cast<size_t>(counts[beam])};
  }

 private:
  const int64_t* given;
  int64_t width;
  std::vector<int64_t> tokens;
  std::vector<int64_t> counts;
};

// The greatest logit of a chunk without some of its tokens, ordered (beam/score.h); 0 where nothing
// is left. `first` is the chunk's first token.
template <class T>
uint32_t greatest_without(Tokens excluded, const T* logits, int64_t count, int64_t first) {
  if (static_cast<int64_t>(excluded.size()) == count) return 0;
  T left[kChunk];
  std::copy(logits, logits + count, left);
  for (const int64_t token : excluded) left[token - first] = from_float<T>(-kInf);
  return beam::ordered(scan_chunk(left, count, false).greatest);
}

// Adds the candidates among some children of a beam's node; `first` is the flat index of token 0.
template <class T>
void gather_children(const T* logits, int64_t vocab, const int32_t* tokens, int64_t count,
                     int64_t first, Tokens excluded, const Normaliser& n, Threshold& threshold,
                     Candidates& out) {
  float picked[kChunk];
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t token = static_cast<uint32_t>(tokens[i]);
    picked[i] = to_float(logits[std::min(token, static_cast<uint64_t>(vocab - 1))]);
  }
  gather_chunk(picked, count, n, threshold, out, [&](int64_t i) -> int64_t {
    const int64_t token = tokens[i];
    return token < 0 || token >= vocab || holds(excluded, token) ? -1 : first + token;
  });
}

}  // namespace flashkern::FK_ISA::topk
