// What happens to the scores of a warp between the two products: scale, softcap, ALiBi, bias,
// masks, the online softmax, dropout. Scores are in units of log2, as in csrc/attention/softmax.h.
//
// A lane has two rows, g and g + 8 of the warp's 16, and of each 8 keys the pair 2t, 2t + 1
// (products.h). Each step is a pass of its own over registers; plain attention takes the first
// and the last alone.
#pragma once

#include "attention/mask.h"
#include "attention/sm80/tile.h"
#include "attention/softmax.h"
#include "dropout.h"

namespace flashkern::attention::sm80 {

// One query row as a lane sees it.
struct Row {
  int query = 0, head = 0;
  int first_key = 0, end_key = 0;
  float slope = 0;        // of ALiBi, in units of log2
  int64_t bias = 0;       // where the row's bias starts
  RowState<float> state;  // its sum is of this lane's keys alone until finish
};

FK_DEVICE Row make_row(const Problem& p, const Sequence& s, int kv_head, int r) {
  const int group = static_cast<int>(p.group());
  const Band band(p, s);
  Row row;
  row.query = r / group;
  row.head = kv_head * group + r % group;
  row.first_key = static_cast<int>(band.first_key(row.query));
  row.end_key = static_cast<int>(band.end_key(row.query));
  if (p.alibi_slopes != nullptr) {
    row.slope = p.alibi_slopes[s.batch * p.alibi_batch + row.head * p.alibi_head] *
                static_cast<float>(kLog2e);
  }
  row.bias = s.batch * p.bias.batch + row.head * p.bias.head + row.query * p.bias.row;
  return row;
}

// Calls fn(score, row, key) for every score of the lane. `first` is the tile's first key.
template <int N, class Fn>
FK_DEVICE void for_each_score(float (&s)[N][4], Row (&rows)[2], int first, Fn&& fn) {
  const int pair = first + ptx::lane_id() % 4 * 2;
#pragma unroll
  for (int j = 0; j < N; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fn(s[j][i], rows[i / 2], pair + 8 * j + i % 2);
  }
}

template <class T>
FK_DEVICE float bias_element(const Bias& bias, int64_t at) {
  switch (bias.kind) {
    case BiasKind::kBool:
      return static_cast<const bool*>(bias.data)[at] ? 0.0f : -INFINITY;
    case BiasKind::kFloat32:
      return static_cast<const float*>(bias.data)[at] * static_cast<float>(kLog2e);
    default:
      return ptx::to_float(static_cast<const T*>(bias.data)[at]) * static_cast<float>(kLog2e);
  }
}

// From products of queries and keys to masked logits. `whole`: every row sees every key of the
// tile.
template <class T, int N>
FK_DEVICE void modify(float (&s)[N][4], Row (&rows)[2], int first, const Problem& p, int offset,
                      bool whole) {
  const bool capped = p.softcap > 0;
  const float scale = static_cast<float>(capped ? p.scale / p.softcap : p.scale * kLog2e);
  for_each_score(s, rows, first, [&](float& x, Row&, int) { x *= scale; });
  if (capped) {
    const float cap = static_cast<float>(p.softcap * kLog2e);
    for_each_score(s, rows, first, [&](float& x, Row&, int) { x = tanhf(x) * cap; });
  }
  if (p.alibi_slopes != nullptr) {
    for_each_score(s, rows, first, [&](float& x, Row& row, int key) {
      x -= row.slope * fabsf(static_cast<float>(row.query + offset - key));
    });
  }
  if (p.bias.kind != BiasKind::kNone) {
    for_each_score(s, rows, first, [&](float& x, Row& row, int key) {
      if (key < row.end_key) x += bias_element<T>(p.bias, row.bias + key * p.bias.column);
    });
  }
  if (whole) return;
  for_each_score(s, rows, first, [&](float& x, Row& row, int key) {
    if (key < row.first_key || key >= row.end_key) x = -INFINITY;
  });
}

// Over the four lanes that share a row.
FK_DEVICE float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(ptx::kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(ptx::kAllLanes, x, 2));
}
FK_DEVICE float row_sum(float x) {
  x += __shfl_xor_sync(ptx::kAllLanes, x, 1);
  return x + __shfl_xor_sync(ptx::kAllLanes, x, 2);
}

// Scores become probabilities, up to the sum that is not known yet. factor[i]: for what row i has
// accumulated.
template <int N>
FK_DEVICE void online_softmax(float (&s)[N][4], Row (&rows)[2], float (&factor)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    RowState<float>& state = rows[r].state;
    float maximum = -INFINITY;
#pragma unroll
    for (int j = 0; j < N; ++j) maximum = fmaxf(maximum, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
    maximum = fmaxf(state.maximum, row_max(maximum));
    const float base = exponent_base(maximum);
    factor[r] = ptx::fast_exp2(state.maximum - base);
    state.maximum = maximum;
    state.sum *= factor[r];
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        s[j][i] = ptx::fast_exp2(s[j][i] - base);
        state.sum += s[j][i];
      }
    }
  }
}

// Whether dropout keeps the probability of (query, head, key). Four keys share a counter.
FK_DEVICE bool kept(const Problem& p, uint64_t threshold, int batch, int head, int query, int key) {
  const Philox4 words = philox(*p.seed, static_cast<uint32_t>(key / 4), query, head, batch);
  const uint32_t low = key % 2 ? words.word[1] : words.word[0];
  const uint32_t high = key % 2 ? words.word[3] : words.word[2];
  return (key % 4 < 2 ? low : high) >= threshold;
}

// Zeros what dropout removes; 1 / (1 - p) waits for the end. The random numbers are drawn in a loop
// of its own that stays rolled up, into a bit for each score: they would crowd out the sums.
template <int N>
FK_DEVICE void drop(float (&s)[N][4], const Row (&rows)[2], int first, const Problem& p,
                    int batch) {
  const uint64_t threshold = dropout_threshold(p.dropout_p);
  const int pair = first + ptx::lane_id() % 4 * 2;
  uint32_t mask = 0;
#pragma unroll 1
  for (int i = 0; i < 4 * N; ++i) {
    const int query = i & 2 ? rows[1].query : rows[0].query;
    const int head = i & 2 ? rows[1].head : rows[0].head;
    const bool keep = kept(p, threshold, batch, head, query, pair + i / 4 * 8 + i % 2);
    mask |= static_cast<uint32_t>(keep) << i;
  }
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) {
    if ((mask >> i & 1) == 0) s[i / 4][i % 4] = 0.0f;
  }
}

}  // namespace flashkern::attention::sm80
