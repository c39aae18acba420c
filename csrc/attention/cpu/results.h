// From a row's accumulators to its output and lse, and the merge of a row's parts where the keys
// were split. Parts are merged in the order of their keys, by whichever thread finishes last, so
// the bits never depend on the threads.
#pragma once

#include "attention/cpu/scores.h"
#include "attention/cpu/scratch.h"
#include "attention/plan.h"

namespace flashkern::FK_ISA::attention {

template <class T>
inline void store_scaled(T* out, const float* from, int64_t count, float factor) {
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) store(out + d, load(from + d) * factor);
  if (d < count) {
    const int tail = static_cast<int>(count - d);
    store_partial(out + d, load_partial(from + d, tail) * factor, tail);
  }
}

// Writes one finished row: `accumulated` holds the sum of 2^(s - maximum) V.
template <class T>
inline void finish_row(const ForwardParams& p, const HeadView& view, int64_t row,
                       RowState<float> state, const float* accumulated) {
  const int64_t query = view.query_of(row), head = view.head_of(row);
  const bool blind = state.blind();
  float factor = keep_factor(p.dropout_p);
  if (p.sinks != nullptr) {
    factor *= add_sink(state, p.sinks[head] * static_cast<float>(kLog2e));
  }
  factor *= inverse_sum(state.sum);
  T* out = row_of<T>(p.output, view.sequence, head, query);
  if (blind) {
    std::memset(static_cast<void*>(out), 0, p.value_dim * sizeof(T));
  } else {
    store_scaled(out, accumulated, p.value_dim, factor);
  }
  float* lse = static_cast<float*>(p.lse.data) + view.sequence.batch * p.lse.batch +
               head * p.lse.head + view.sequence.q_start + query;
  *lse = log_sum_exp(state);
}

// The parts of all rows of one launch whose keys are split: value_dim accumulators and two numbers.
class Parts {
 public:
  Parts(int64_t count, int64_t value_dim)
      : value_dim_(value_dim), memory_(allocate_floats(count * (value_dim + 2))) {}

  float* accumulated(int64_t part) { return memory_.get() + part * (value_dim_ + 2); }
  RowState<float> state(int64_t part) {
    const float* p = accumulated(part) + value_dim_;
    return {p[0], p[1]};
  }
  void set(int64_t part, RowState<float> state, const float* from) {
    float* p = accumulated(part);
    if (state.blind()) {
      std::memset(p, 0, value_dim_ * sizeof(float));
    } else {
      std::memcpy(p, from, value_dim_ * sizeof(float));
    }
    p[value_dim_] = state.maximum;
    p[value_dim_ + 1] = state.sum;
  }

  // Merges parts [first, first + count) into `out`.
  RowState<float> merge(int64_t first, int64_t count, float* out) {
    RowState<float> row;
    for (int64_t i = first; i < first + count; ++i) {
      const float m = state(i).maximum;
      row.maximum = row.maximum < m ? m : row.maximum;
    }
    const float base = exponent_base(row.maximum);
    std::memset(out, 0, value_dim_ * sizeof(float));
    for (int64_t i = first; i < first + count; ++i) {
      const RowState<float> part = state(i);
      const float factor = std::exp2(part.maximum - base);
      row.sum += part.sum * factor;
      const float* from = accumulated(i);
      for (int64_t d = 0; d < value_dim_; ++d) out[d] += from[d] * factor;
    }
    return row;
  }

 private:
  int64_t value_dim_;
  Floats memory_;
};

}  // namespace flashkern::FK_ISA::attention
