// Constraints on the CPU. Excluded tokens leave a chunk before its greatest logit is taken for the
// threshold: else k chunks above it would not promise k candidates. A trie's children are scored
// list by list. Most lists are short; of a long one (the root's) only chunks that can matter.
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
    const int64_t* own = given + beam * width;
    if (width > 32) {
      std::copy(own, own + width, first);
      std::sort(first, first + width);
    } else {  // each one's place by counting: a few vectors, and no branch to guess
      for (int64_t i = 0; i < width; ++i) {
        int64_t before = 0;
        for (int64_t j = 0; j < i; ++j) before += own[j] <= own[i];
        for (int64_t j = i + 1; j < width; ++j) before += own[j] < own[i];
        first[before] = own[i];
      }
    }
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
// is left. `first` is the chunk's first token, `greatest` the greatest logit of all: mostly no
// excluded token has it.
template <class T>
uint32_t greatest_without(Tokens excluded, const T* logits, int64_t count, int64_t first,
                          float greatest) {
  bool below = true;
  for (const int64_t token : excluded) below &= to_float(logits[token - first]) < greatest;
  if (below) return beam::ordered(greatest);
  if (static_cast<int64_t>(excluded.size()) == count) return 0;
  T left[kChunk];
  std::copy(logits, logits + count, left);
  for (const int64_t token : excluded) left[token - first] = from_float<T>(-kInf);
  return beam::ordered(greatest_of(left, count));
}

// The children of every beam's node, or of none.
inline std::vector<beam::Children> children_of_all(const beam::Constraints& c, int64_t beams) {
  std::vector<beam::Children> all(c.nodes == nullptr ? 0 : beams);
  for (size_t beam = 0; beam < all.size(); ++beam) all[beam] = beam::children_of(c, beam);
  return all;
}

// Those in [begin, end), ascending as all are.
inline beam::Children between(const beam::Children& all, int64_t begin, int64_t end) {
  const int32_t* stop = all.tokens + all.count;
  const int32_t* first = std::lower_bound(all.tokens, stop, begin);
  return {first, std::lower_bound(first, stop, end) - first};
}

// The logits of some children. The adapter has seen that tokens ascend; were it wrong, a logit may
// be another's here, but no address is.
template <class T>
void pick(const T* row, int64_t vocab, const beam::Children& some, float* picked) {
  const uint32_t last = static_cast<uint32_t>(vocab - 1);
  for (int64_t i = 0; i < some.count; ++i) {
    picked[i] = to_float(row[std::min(static_cast<uint32_t>(some.tokens[i]), last)]);
  }
}

// Adds the candidates among some children with these logits; `first` is the flat index of the row's
// token 0.
inline void gather_children(const beam::Children& some, const float* picked, int64_t vocab,
                            int64_t first, Tokens excluded, const Normaliser& n,
                            Threshold& threshold, Candidates& out) {
  gather_chunk(picked, some.count, n, threshold, out, [&](int64_t i) {
    const int64_t token = some.tokens[i];
    const bool allowed = token >= 0 && token < vocab && !holds(excluded, token);
    return allowed ? first + token : -1;
  });
}

}  // namespace flashkern::FK_ISA::topk
