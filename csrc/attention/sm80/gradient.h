// From a product of a query and a key to what the backward pass multiplies: probabilities and the
// gradients of logits, recomputed element by element.
#pragma once

#include "attention/sm80/scores.h"

namespace flashkern::attention::sm80 {

// A query row of the backward pass. Rows past the last see no key.
struct GradientRow : Row {
  float lse = 0;    // in units of log2
  float delta = 0;  // rowsum(dO * O) - grad_lse
};

FK_DEVICE int64_t row_value_at(const RowValues& v, const Sequence& s, const Row& row) {
  return s.batch * v.batch + row.head * v.head + s.q_start + row.query;
}

FK_DEVICE GradientRow make_gradient_row(const BackwardParams& p, const Sequence& s, int kv_head,
                                        int r, int end) {
  GradientRow row;
  static_cast<Row&>(row) = make_row(p, s, kv_head, r < end ? r : end - 1);
  const float lse = static_cast<const float*>(p.lse.data)[row_value_at(p.lse, s, row)];
  row.lse = lse * static_cast<float>(kLog2e);
  row.delta = static_cast<const float*>(p.delta.data)[row_value_at(p.delta, s, row)];
  if (r >= end || lse == -INFINITY) row.first_key = row.end_key = 0;
  return row;
}

// What all elements of a block share.
struct GradientRule {
  float scale, cap, keep;
  uint64_t threshold;
  int batch, offset;

  FK_DEVICE GradientRule(const BackwardParams& p, const Sequence& s)
      : scale(static_cast<float>(p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2e)),
        cap(static_cast<float>(p.softcap * kLog2e)),
        keep(p.dropout_p < 1 ? static_cast<float>(1 / (1 - p.dropout_p)) : 0.0f),
        threshold(p.dropout_p > 0 ? dropout_threshold(p.dropout_p) : 0),
        batch(static_cast<int>(s.batch)),
        offset(static_cast<int>(s.offset)) {}

  // x: the product of query and key, becomes P as dropout left it; y: that of dO and value, becomes
  // the gradient of x / scale. Returns that of the bias, which is added after the cap.
  template <class T>
  FK_DEVICE float apply(const BackwardParams& p, const GradientRow& row, int key, bool kept,
                        float& x, float& y) const {
    if (key < row.first_key || key >= row.end_key) {
      x = y = 0;
      return 0;
    }
    float logit = x * scale, slope = 1;
    if (cap > 0) {
      const float t = tanhf(logit);
      logit = t * cap;
      slope = 1 - t * t;
    }
    logit -= row.slope * fabsf(static_cast<float>(row.query + offset - key));
    if (p.bias.kind != BiasKind::kNone) {
      logit += bias_element<T>(p.bias, row.bias + key * p.bias.column);
    }
    const float probability = ptx::fast_exp2(logit - row.lse);
    const float factor = kept ? keep : 0.0f;
    x = probability * factor;
    const float of_bias = probability * (y * factor - row.delta);
    y = of_bias * slope;
    return of_bias;
  }
};

}  // namespace flashkern::attention::sm80
