// One score in float64, term by term in the order of the definition. The float64 kernels serve
// gradcheck and tests: every feature of the float32 ones, none of their speed.
#pragma once

#include <cmath>
#include <limits>

#include "attention/params.h"
#include "dropout.h"

namespace flashkern::FK_ISA::attention {

using namespace flashkern::attention;

inline double bias_value(const Problem& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  const Bias& bias = p.bias;
  const int64_t at = b * bias.batch + h * bias.head + i * bias.row + j * bias.column;
  switch (bias.kind) {
    case BiasKind::kNone:
      return 0;
    case BiasKind::kBool:
      return static_cast<const bool*>(bias.data)[at] ? 0 : -std::numeric_limits<double>::infinity();
    case BiasKind::kFloat32:
      return static_cast<const float*>(bias.data)[at];
    default:
      return static_cast<const double*>(bias.data)[at];
  }
}

inline bool keeps(const Problem& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  const Philox4 words = philox(*p.seed, static_cast<uint32_t>(j / 4), static_cast<uint32_t>(i),
                               static_cast<uint32_t>(h), static_cast<uint32_t>(b));
  return words.word[j % 4] >= dropout_threshold(p.dropout_p);
}

// What ALiBi and the bias add to the score of query i and key j; the diagonal is at j = i + offset.
inline double added_score(const Problem& p, int64_t b, int64_t h, int64_t i, int64_t j,
                          int64_t offset) {
  double added = bias_value(p, b, h, i, j);
  if (p.alibi_slopes != nullptr) {
    const double slope = p.alibi_slopes[b * p.alibi_batch + h * p.alibi_head];
    added -= slope * std::fabs(double(i + offset - j));
  }
  return added;
}

}  // namespace flashkern::FK_ISA::attention
