// From a product of a query and a key, and one of dO and a value, to what the backward pass
// multiplies: probabilities and the gradients of logits, recomputed element by element.
#pragma once

#include "attention/sm80/plan.h"
#include "attention/sm80/scores.h"

namespace flashkern::attention::sm80 {

// What row_deltas leaves of a query row.
struct alignas(8) RowNumbers {
  float lse;    // in units of log2; +inf where the row attends to nothing: 2^(x - lse) = 0
  float delta;  // rowsum(dO * O) - grad_lse
};

// The band of a mask in 32 bits: what a query sees begins at query + low and ends at query + high.
struct KeyBand {
  int low, high, keys;

  FK_DEVICE KeyBand(const Problem& p, const Sequence& s) : keys(static_cast<int>(s.k_length)) {
    constexpr int64_t kFar = 1 << 30;
    const Band b(p, s);
    low = static_cast<int>(b.left < 0 ? -kFar : clamped(b.offset - b.left, -kFar, kFar));
    high = static_cast<int>(b.right < 0 ? kFar : clamped(b.offset + b.right + 1, -kFar, kFar));
  }
  FK_DEVICE int first(int query) const { return min(max(query + low, 0), keys); }
  FK_DEVICE int end(int query) const { return min(max(query + high, 0), keys); }
};

// The heads of a group, and a quotient by their number as a product: exact for the sum of a head
// and a row within a tile.
struct Group {
  int heads;
  uint32_t inverse;  // 2^32 / heads, rounded up

  FK_DEVICE explicit Group(int heads)
      : heads(heads), inverse(0xffffffffu / static_cast<uint32_t>(heads) + 1) {}
  FK_DEVICE int quotient(int x) const {
    return heads == 1 ? x : static_cast<int>(__umulhi(static_cast<uint32_t>(x), inverse));
  }
};

// Where packed rows stand: row r of a KV head is query r / group of the group's head r % group.
struct Place {
  int query = 0, head = 0;

  FK_DEVICE Place after(int rows, const Group& group) const {
    const int queries = group.quotient(head + rows);
    return {query + queries, head + rows - queries * group.heads};
  }
  template <class M>
  FK_DEVICE int64_t at(const M& m) const {  // from the group's first row in a Matrix or an Output
    return head * m.head + query * m.row;
  }
};

// What dropout keeps, bit n, of four draws: number n by the lane whose bits 2 and 3 are n. Lanes
// that differ there alone exchange words, each for the key of the four that it has.
FK_DEVICE uint32_t kept_of_four(Philox4 x, uint32_t below, int lane) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {  // a transposition: words 0 and 1, 2 and 3; 0 and 2, 1 and 3
    const int bit = 1 + n / 2, low = n / 2 ? n % 2 : 2 * n, high = low + bit;
    const bool upper = lane / 4 & bit;
    const uint32_t other =
        __shfl_xor_sync(ptx::kAllLanes, upper ? x.word[low] : x.word[high], 4 * bit);
    x.word[low] = upper ? other : x.word[low];
    x.word[high] = upper ? x.word[high] : other;
  }
  uint32_t bits = 0;
#pragma unroll
  for (int n = 0; n < 4; ++n) bits |= static_cast<uint32_t>(x.word[n] > below) << n;
  return bits;
}

// A query row that meets scores which more than scale and mask make.
struct FullRow {
  int query, head;
  int diagonal;  // the key it meets there
  float slope;   // of ALiBi, in units of log2
  int64_t bias;  // where the row's bias starts
};

FK_DEVICE FullRow make_full_row(const Problem& p, const Sequence& s, int query, int head) {
  FullRow row{query, head, query + static_cast<int>(s.offset), 0,
              s.batch * p.bias.batch + head * p.bias.head + query * p.bias.row};
  if (p.alibi_slopes != nullptr) {
    row.slope =
        p.alibi_slopes[s.batch * p.alibi_batch + head * p.alibi_head] * static_cast<float>(kLog2e);
  }
  return row;
}

struct GradientRule : ScoreRule {
  float product = 0;  // the factor of dQ and dK

  GradientRule() = default;
  explicit GradientRule(const Problem& p) : ScoreRule(p), product(static_cast<float>(p.scale)) {}

  // Beyond 2^24 a rounded log-sum-exp may lie far below a logit: P stays finite.
  FK_DEVICE static float probability(float x) { return ptx::fast_exp2(x > 1 ? 1 : x); }

  // x: the product of query and key, becomes P; y: that of dO and value, becomes the gradient of
  // x / scale.
  FK_DEVICE void plain(const RowNumbers& row, float& x, float& y) const {
    x = probability(fmaf(x, scale, -row.lse));
    y = x * (y - row.delta);
  }

  // The same with all that changes a logit; P as dropout left it. Returns the gradient of the bias,
  // which is added after the cap.
  template <class T>
  FK_DEVICE float full(const BackwardParams& p, const RowNumbers& numbers, const FullRow& row,
                       int key, bool kept, float& x, float& y) const {
    float logit = x * scale, slope = 1;
    if (cap > 0) {
      const float t = tanhf(logit);
      logit = t * cap;
      slope = 1 - t * t;
    }
    logit -= row.slope * fabsf(static_cast<float>(row.diagonal - key));
    if (p.bias.kind != BiasKind::kNone) {
      logit += bias_element<T>(p.bias, row.bias + key * p.bias.column);
    }
    const float p_whole = probability(logit - numbers.lse);
    const float factor = kept ? keep : 0.0f;
    x = p_whole * factor;
    const float of_bias = p_whole * (y * factor - numbers.delta);
    y = of_bias * slope;
    return of_bias;
  }
};

}  // namespace flashkern::attention::sm80
