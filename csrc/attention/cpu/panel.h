// One panel of query rows meets one block of keys: the inner step of the matrix kernel.
//
//                 P queries (two vectors)                value_dim
//              +--------+                            +---------------+
//   queries^T  | D x P  |  packed once               |  n x value_dim|  values, packed in panels
//              +--------+                            +---------------+  of P columns
//   keys    +--+ +--------+        +--------+
//   n x D   |  | | n x P  | -exp2- | n x P  | read as P x n -> P x value_dim accumulators
//           +--+ +--------+        +--------+
//   float32 in   scores            probabilities, in the same place
//   place, broadcast
//
// P = kPanel: 8, 16 or 32. Scores are held transposed. Keys are then the broadcast operand of the
// first product, read where they lie if they are float32; values are the vector operand of the
// second. The softmax runs down the lanes without a horizontal step, and the running maximum and
// sum of P rows are two vectors each.
#pragma once

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

// Scores of one vector of rows become probabilities relative to the new maximum. Returns the factor
// that brings what the rows had accumulated to that maximum.
inline VecF softmax_lanes(float* s, int64_t n, float* maximum, float* sum) {
  VecF top[4];
  for (VecF& t : top) t = load(maximum);
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    for (int k = 0; k < 4; ++k) top[k] = max(load(s + (j + k) * kPanel), top[k]);
  }
  for (; j < n; ++j) top[0] = max(load(s + j * kPanel), top[0]);
  const VecF m = max(max(top[0], top[1]), max(top[2], top[3]));
  const VecF base = m == -kInf ? VecF{} : m;

  VecF total[2] = {VecF{}, VecF{}};
  for (j = 0; j + 2 <= n; j += 2) {
    for (int k = 0; k < 2; ++k) {
      float* at = s + (j + k) * kPanel;
      const VecF p = exp2_below_zero(load(at) - base);
      total[k] += p;
      store(at, p);
    }
  }
  if (j < n) {
    const VecF p = exp2_below_zero(load(s + j * kPanel) - base);
    total[0] += p;
    store(s + j * kPanel, p);
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

struct KeyTile {
  const float* keys;
  int64_t key_row;
  const float* values;  // packed: [panel][end - begin][kPanel]
  int64_t begin, end;
};

// Rescales the rows of `out` whose maximum has moved; most blocks move none.
inline void rescale_rows(float* out, int count, int64_t out_row, const float* factor) {
  for (int lane = 0; lane < count; ++lane) {
    if (factor[lane] == 1.f) continue;
    float* row = out + lane * out_row;
    for (int64_t e = 0; e < out_row; e += kLanes) store(row + e, load(row + e) * factor[lane]);
  }
}

// Adds keys [begin, end) of `tile` to the panel. `queries` is [head_dim][kPanel], `out` is
// [kPanel][value_dim].
inline void attend_panel(const HeadView& view, const PanelRows& rows, const KeyTile& tile,
                         int64_t begin, int64_t end, const float* queries, PanelState& state,
                         float* out, const PanelScratch& scratch) {
  const Problem& p = *view.problem;
  const int64_t n = end - begin;
  float* s = scratch.scores;
  const float* keys = tile.keys + (begin - tile.begin) * tile.key_row;
  gemm<false>(n, kPanel, p.head_dim, {keys, tile.key_row, 1, queries, kPanel, s, kPanel});

  if (p.softcap > 0) apply_softcap(s, n * kPanel, p.softcap);
  if (p.alibi_slopes != nullptr) apply_alibi(s, begin, n, view, rows);
  if (p.bias.kind != BiasKind::kNone) apply_bias(s, scratch.bias, begin, n, view, rows);
  const Interval all = view.band.all_keys(rows.first_query, rows.last_query + 1);
  if (begin < all.begin || end > all.end) apply_band(s, begin, n, rows);

  alignas(64) float factor[kPanel];
  for (int v = 0; v < kPanel; v += kLanes) {
    store(factor + v, softmax_lanes(s + v, n, state.maximum + v, state.sum + v));
  }
  if (p.dropout_p > 0) apply_dropout(s, begin, n, view, rows);

  const int64_t out_row = round_up(p.value_dim, kPanel);
  GemmOperands product{s,      1,   kPanel, tile.values + (begin - tile.begin) * kPanel,
                       kPanel, out, out_row};
  if (state.touched) rescale_rows(out, rows.count, out_row, factor);
  for (int64_t e = 0; e < out_row; e += kPanel, product.c += kPanel) {
    if (state.touched) {
      gemm<true>(rows.count, kPanel, n, product);
    } else {
      gemm<false>(rows.count, kPanel, n, product);
    }
    product.b += (tile.end - tile.begin) * kPanel;
  }
  state.touched = true;
}

}  // namespace flashkern::FK_ISA::attention
