// What happens to the scores of a warp between the two products: scale, softcap, ALiBi, bias,
// masks, the online softmax, dropout. Logits are in units of log2, as in csrc/attention/softmax.h.
//
// A lane has two rows of each strip, g and g + 8 of its 16, and of each 8 keys the pair 2t, 2t + 1
// (products.h). Each step is a pass of its own over registers. Plain attention takes the softmax
// alone, which multiplies by the scale as it subtracts the maximum, and the mask where a tile is
// cut by it.
#pragma once

#include "attention/mask.h"
#include "attention/sm80/tile.h"
#include "attention/softmax.h"
#include "dropout.h"

namespace flashkern::attention::sm80 {

// One query row. The forward pass keeps those of a block in shared memory: registers are for sums.
struct Row {
  int query = 0, head = 0, batch = 0;
  int first_key = 0, end_key = 0;
  float slope = 0;   // of ALiBi, in units of log2
  int64_t bias = 0;  // where the row's bias starts
};

FK_DEVICE Row make_row(const Problem& p, const Sequence& s, int kv_head, int r) {
  const RowOwner owner(p, s, kv_head, r);
  const Band band(p, s);
  Row row;
  row.query = owner.query;
  row.head = owner.head;
  row.batch = owner.batch;
  row.first_key = static_cast<int>(band.first_key(row.query));
  row.end_key = static_cast<int>(band.end_key(row.query));
  if (p.alibi_slopes != nullptr) {
    row.slope = p.alibi_slopes[row.batch * p.alibi_batch + row.head * p.alibi_head] *
                static_cast<float>(kLog2e);
  }
  row.bias = row.batch * p.bias.batch + row.head * p.bias.head + row.query * p.bias.row +
             s.earlier * p.bias.column;
  return row;
}

// Calls fn(score, row, key) for every score of the lane in a strip. `rows`: the lane's own two lie
// 8 apart from there on. `first`: the tile's first key.
template <int N, class Fn>
FK_DEVICE void for_each_score(float (&s)[N][4], const Row* rows, int first, Fn&& fn) {
  const int pair = first + static_cast<int>(ptx::lane_id()) % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const Row& row = rows[8 * r];
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) fn(s[j][2 * r + i], row, pair + 8 * j + i);
    }
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

// From products of queries and keys to logits, all but the mask.
template <class T, int N>
FK_DEVICE void modify(float (&s)[N][4], const Row* rows, int first, const Problem& p,
                      const ScoreRule& rule, int offset) {
  for_each_score(s, rows, first, [&](float& x, const Row&, int) { x *= rule.scale; });
  if (rule.cap > 0) {
    for_each_score(s, rows, first, [&](float& x, const Row&, int) { x = tanhf(x) * rule.cap; });
  }
  if (p.alibi_slopes != nullptr) {
    for_each_score(s, rows, first, [&](float& x, const Row& row, int key) {
      x -= row.slope * fabsf(static_cast<float>(row.query + offset - key));
    });
  }
  if (p.bias.kind != BiasKind::kNone) {
    for_each_score(s, rows, first, [&](float& x, const Row& row, int key) {
      if (key < row.end_key) x += bias_element<T>(p.bias, row.bias + key * p.bias.column);
    });
  }
}

// For a tile that some row does not see whole.
template <int N>
FK_DEVICE void mask(float (&s)[N][4], const Row* rows, int first) {
  const int pair = first + static_cast<int>(ptx::lane_id()) % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int begin = rows[8 * r].first_key - pair, end = rows[8 * r].end_key - pair;
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool seen = (8 * j + i >= begin) & (8 * j + i < end);
        s[j][2 * r + i] = seen ? s[j][2 * r + i] : -INFINITY;
      }
    }
  }
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

// Scores become probabilities, up to the sum that is not known yet. `scale`: what makes logits of
// them. states[i] and factor[i] are of row i, the factor for what it has accumulated. A lane's sums
// are of its own keys until the end.
template <int N>
FK_DEVICE void online_softmax(float (&s)[N][4], RowState<float> (&states)[2], float scale,
                              float (&factor)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    RowState<float>& state = states[r];
    float maximum = fmaxf(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
    for (int j = 1; j < N; ++j) maximum = fmaxf(maximum, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
    maximum = fmaxf(state.maximum, row_max(maximum) * scale);
    const float base = exponent_base(maximum);
    factor[r] = ptx::fast_exp2(state.maximum - base);
    state.maximum = maximum;
    state.sum *= factor[r];
    float unit = scale;
    if (fabsf(base) > 0x1p24f) {  // unit * s - base may be far from 0 at the top
      unit = 1;
#pragma unroll
      for (int j = 0; j < N; ++j) s[j][2 * r] *= scale, s[j][2 * r + 1] *= scale;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        s[j][i] = ptx::fast_exp2(fmaf(s[j][i], unit, -base));
        state.sum += s[j][i];
      }
    }
  }
}

// Which of the lane's scores dropout removes: bit 4 j + i. Two lanes share four keys, and so a
// counter, in each of two rows: either draws for one row and hands half over. The loop stays rolled
// up: random numbers of many keys side by side would crowd out the sums.
template <int N>
FK_DEVICE uint32_t dropped(const Row* rows, int first, const Problem& p, uint32_t below,
                           int batch) {
  static_assert(4 * N <= 32);
  const int t = static_cast<int>(ptx::lane_id()) % 4, odd = t % 2;
  const Row& row = rows[8 * odd];
  const uint32_t quad = static_cast<uint32_t>(first / 4 + t / 2);
  uint32_t bits = 0;
#pragma unroll 1
  for (int j = 0; j < N; ++j) {
    const Philox4 own = philox(*p.seed, quad + 2 * j, row.query, row.head, batch);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t other =
          __shfl_xor_sync(ptx::kAllLanes, odd ? own.word[i] : own.word[2 + i], 1);
      bits |= static_cast<uint32_t>((odd ? other : own.word[i]) <= below) << (4 * j + i);
      bits |= static_cast<uint32_t>((odd ? own.word[2 + i] : other) <= below) << (4 * j + 2 + i);
    }
  }
  return bits;
}

// Zeros what dropout removes; 1 / (1 - p) waits for the end.
template <int N>
FK_DEVICE void drop(float (&s)[N][4], const Row* rows, int first, const Problem& p, uint32_t below,
                    int batch) {
  const uint32_t bits = dropped<N>(rows, first, p, below, batch);
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) {
    if (bits >> i & 1) s[i / 4][i % 4] = 0.0f;
  }
}

}  // namespace flashkern::attention::sm80
