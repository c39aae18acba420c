// One panel of query rows meets one block of keys: the inner step of the matrix kernel.
//
//                 P queries (two vectors)
//              +--------+
//   queries^T  | D x P  |  packed once
//              +--------+
//   keys    +--+ +--------+        +--------+
//   n x D   |  | | n x P  | -exp2- | n x P  |  scores, then probabilities in the same place
//           +--+ +--------+        +--------+
//   values^T             +-------+ +--------+
//   E x n                |       | | E x P  |  accumulators
//                        +-------+ +--------+
//
// With bfloat16 in pairs (kInPairs) a lane of queries^T and of the probabilities holds two
// neighbours of a sum, and probabilities are rounded to bfloat16 for the second product.
//
// P = kPanel: 8, 16 or 32. Everything that belongs to a query lies in its lane: keys and values are
// the broadcast operand of both products, read where they lie if their type allows. The softmax
// runs down the lanes without a horizontal step, and the running maximum and sum of P rows are two
// vectors each.
#pragma once

#include "attention/cpu/product.h"
#include "attention/cpu/scores.h"
#include "attention/plan.h"

namespace flashkern::FK_ISA::attention {

// The rows' softmax in progress.
struct PanelState {
  alignas(64) float maximum[kPanel];
  alignas(64) float sum[kPanel];
  bool touched;  // false: the accumulators hold nothing yet

  void reset() {
    for (int lane = 0; lane < kPanel; ++lane) {
      maximum[lane] = -kInf;
      sum[lane] = 0;
    }
    touched = false;
  }
};

// Scores of one vector of rows, times `unit`, which is positive, become probabilities relative to
// the new maximum, or pairs of them in half as many rows. Returns the factor that brings what the
// rows had accumulated to that maximum.
template <bool kToPairs>
inline VecF softmax_lanes(float* s, int64_t n, float unit, float* maximum, float* sum) {
  VecF top[4];
  for (VecF& t : top) t = broadcast(-kInf);
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    for (int k = 0; k < 4; ++k) top[k] = max(load(s + (j + k) * kPanel), top[k]);
  }
  for (; j < n; ++j) top[0] = max(load(s + j * kPanel), top[0]);
  const VecF m = max(max(max(top[0], top[1]), max(top[2], top[3])) * unit, load(maximum));
  const VecF base = m == -kInf ? VecF{} : m;
  if (unit != 1 && any(absolute(base) > 0x1p24f)) {  // unit * s - base may be far from 0 at the top
    for (j = 0; j < n; ++j) store(s + j * kPanel, load(s + j * kPanel) * unit);
    unit = 1;
  }

  VecF total[2] = {VecF{}, VecF{}};
  for (j = 0; j + 2 <= n; j += 2) {
    VecF p[2];
    for (int k = 0; k < 2; ++k) {
      p[k] = exp2_below_zero(fma(load(s + (j + k) * kPanel), broadcast(unit), -base));
      total[k] += p[k];
      if (!kToPairs) store(s + (j + k) * kPanel, p[k]);
    }
    if (kToPairs) store(s + j / 2 * kPanel, round_to_pairs(p[0], p[1]));
  }
  if (j < n) {
    const VecF p = exp2_below_zero(fma(load(s + j * kPanel), broadcast(unit), -base));
    total[0] += p;
    store(s + j / (kToPairs ? 2 : 1) * kPanel, kToPairs ? round_to_pairs(p, VecF{}) : p);
  }
  const VecF factor = exp2_below_zero(load(maximum) - base);
  store(sum, fma(load(sum), factor, total[0] + total[1]));
  store(maximum, m);
  return factor;
}

// The panel's scratch: two tiles of kKeyBlock x kPanel, scores and bias.
struct PanelScratch {
  float* scores;
  float* bias;
};

// Probabilities that dropout has been through, as pairs in half as many rows.
inline void pair_rows(float* s, int64_t n) {
  for (int64_t j = 0; j < n; j += 2) {
    for (int v = 0; v < kPanel; v += kLanes) {
      const float* at = s + j * kPanel + v;
      const VecF second = j + 1 < n ? load(at + kPanel) : VecF{};
      store(s + j / 2 * kPanel + v, round_to_pairs(load(at), second));
    }
  }
}

// Zeros behind n probabilities in pairs, up to a whole step of the sum.
inline void pad_pairs(float* s, int64_t n) {
  for (int64_t j = ceil_div(n, 2); j < round_up(n, kTileDepth) / 2; ++j) {
    std::memset(s + j * kPanel, 0, kPanel * sizeof(float));
  }
}

inline void scale_scores(float* s, int64_t count, float factor) {
  for (int64_t i = 0; i < count; i += kLanes) store(s + i, load(s + i) * factor);
}

template <class T>
struct Rows {
  const Factor<T>* data;
  int64_t row;
};

// stage.h says how they lie.
template <class T>
struct KeyTile {
  Rows<T> keys, values;
  int64_t begin;  // the first one's number
};

// Rescales the accumulators where a maximum has moved; most blocks move none.
inline void rescale(float* out, int64_t value_dim, const VecF (&factor)[2]) {
  if (!any((factor[0] != 1.f) | (factor[1] != 1.f))) return;
  for (int64_t e = 0; e < value_dim; ++e, out += kPanel) {
    store(out, load(out) * factor[0]);
    store(out + kLanes, load(out + kLanes) * factor[1]);
  }
}

// Adds keys [begin, end) of `tile` to the panel. `queries` is [head_dim / kStep][kPanel], `out` is
// [value_dim][kPanel]; both are padded for tiles.
template <class T>
inline void attend_panel(const HeadView& view, const PanelRows& rows, const KeyTile<T>& tile,
                         int64_t begin, int64_t end, const float* queries, PanelState& state,
                         float* out, const PanelScratch& scratch) {
  const Problem& p = *view.problem;
  const int64_t n = end - begin, skip = begin - tile.begin;
  float* s = scratch.scores;
  const Rows<T>&keys = tile.keys, &values = tile.values;
  multiply<T, false>(n, kPanel, p.head_dim, {keys.data + skip * keys.row, keys.row},
                     {queries, kPanel}, s, kPanel, query_factor(p));
  float unit = factor_left<T>(query_factor(p));
  const bool plain = p.softcap == 0 && p.alibi_slopes == nullptr && p.bias.kind == BiasKind::kNone;
  if (unit != 1 && !(plain && unit > 0)) scale_scores(s, n * kPanel, std::exchange(unit, 1.f));

  if (p.softcap > 0) apply_softcap(s, n * kPanel, p.softcap);
  if (p.alibi_slopes != nullptr) apply_alibi(s, begin, n, view, rows);
  if (p.bias.kind != BiasKind::kNone) apply_bias(s, scratch.bias, begin, n, view, rows);
  const Interval all = view.band.all_keys(rows.first_query, rows.last_query + 1);
  if (begin < all.begin || end > all.end) apply_band(s, begin, n, rows);

  VecF factor[2];
  const bool drops = p.dropout_p > 0;
  for (int v = 0; v < 2; ++v) {
    const int at = v * kLanes;
    const auto lanes = drops ? softmax_lanes<false> : softmax_lanes<kInPairs<T>>;
    factor[v] = lanes(s + at, n, unit, state.maximum + at, state.sum + at);
  }
  if (drops) apply_dropout(s, begin, n, view, rows);
  if (drops && kInPairs<T>) pair_rows(s, n);

  if (state.touched) rescale(out, p.value_dim, factor);
  if constexpr (kInTiles<T>) pad_pairs(s, n);
  const Left<T> left =
      kInTiles<T> ? Left<T>{values.data + skip, values.row}
                  : Left<T>{values.data + skip * values.row, kStep<T>, kStep<T> * values.row};
  const auto product = state.touched ? multiply<T, true> : multiply<T, false>;
  product(p.value_dim, kPanel, n, left, {s, kPanel}, out, kPanel, 1);
  state.touched = true;
}

}  // namespace flashkern::FK_ISA::attention
