// Constraints as all back ends read them. Nothing here trusts an index: the CPU's adapter refuses
// those out of range (csrc/torch/beam.cpp), a GPU, whose memory no adapter reads, passes over them.
#pragma once

#include "beam/params.h"
#include "beam/score.h"

namespace flashkern::beam {

struct Children {
  const int32_t* tokens = nullptr;
  int64_t count = 0;
};

// The tokens below a beam's node (beams counted over the whole batch).
FK_HOST_DEVICE inline Children children_of(const Constraints& c, int64_t beam) {
  const int64_t node = c.nodes[beam];
  if (node < 0 || node >= c.trie_nodes) return {};
  const int64_t begin = c.trie_starts[node], end = c.trie_starts[node + 1];
  if (begin < 0 || begin > end || end > c.trie_edges) return {};
  return {c.trie_tokens + begin, end - begin};
}

// Writes one place of the result. Nobody scores -inf with the token -1, which is no token: a
// caller that reads tokens alone takes no beam that is not allowed.
FK_HOST_DEVICE inline void put(const TopkParams& p, int64_t at, Candidate chosen) {
  if (chosen == kNobody) {
    p.scores[at] = -kInfinity, p.parents[at] = 0, p.tokens[at] = -1;
    return;
  }
  const uint32_t vocab = static_cast<uint32_t>(p.vocab), index = index_of(chosen);
  p.scores[at] = score_of(ordered_of(chosen));
  p.parents[at] = index / vocab;
  p.tokens[at] = index % vocab;
}

}  // namespace flashkern::beam
