// The arithmetic of a row's softmax that every kernel and every merge shares. A row in progress is
// (maximum, sum): its probabilities are 2^(s - maximum) / sum with s in units of log2, so exp2 does
// the work and scale * log2(e) is folded into the queries.
//
// Milakov and Gimelshein: Online normalizer calculation for softmax (2018).
// Dao: FlashAttention-2 (2023), section 3.1; the merge of parts is Flash-Decoding's.
#pragma once

#include <cmath>
#include <limits>

#include "types.h"

namespace flashkern::attention {

inline constexpr double kLog2e = 1.4426950408889634;
inline constexpr double kLn2 = 0.6931471805599453;

template <class Real>
struct RowState {
  Real maximum = -std::numeric_limits<Real>::infinity();
  Real sum = 0;

  // Attends to nothing so far: no accumulator of the row means anything. (All NaN is not nothing.)
  FK_HOST_DEVICE bool blind() const {
    return maximum == -std::numeric_limits<Real>::infinity() && sum == 0;
  }
};

// The reference point of the exponentials. A row that has seen nothing but -inf keeps its maximum
// of -inf and takes its exponentials from 0: each is 0, and none is NaN.
template <class Real>
FK_HOST_DEVICE inline Real exponent_base(Real maximum) {
  return maximum == -std::numeric_limits<Real>::infinity() ? Real(0) : maximum;
}

// Adds one logit that has no value (a sink): it takes part in the sum alone. Returns the factor for
// whatever the row has accumulated so far.
template <class Real>
FK_HOST_DEVICE inline Real add_sink(RowState<Real>& row, Real sink_log2) {
  const Real maximum = row.maximum < sink_log2 ? sink_log2 : row.maximum;
  const Real base = exponent_base(maximum);
  const Real factor = std::exp2(row.maximum - base);
  row.sum = row.sum * factor + std::exp2(sink_log2 - base);
  row.maximum = maximum;
  return factor;
}

// log(sum of exp) in natural units; -inf for a row that may attend to nothing.
template <class Real>
FK_HOST_DEVICE inline Real log_sum_exp(const RowState<Real>& row) {
  return exponent_base(row.maximum) * Real(kLn2) + std::log(row.sum);
}

// What turns the accumulated row into the output. A sum of 0 gives 0; a NaN stays.
template <class Real>
FK_HOST_DEVICE inline Real inverse_sum(Real sum) {
  return sum == 0 ? Real(0) : Real(1) / sum;
}

}  // namespace flashkern::attention
