// Gradients of attention in float64: one query and one key at a time, straight from the definition
// at the head of backward.cpp.
#include <algorithm>
#include <cmath>
#include <vector>

#include "attention/cpu/backward.h"
#include "attention/cpu/float64.h"
#include "attention/cpu/rows.h"

namespace flashkern::FK_ISA {
namespace attention {
namespace {

double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t d = 0; d < n; ++d) sum += a[d] * b[d];
  return sum;
}

void add_scaled(double* to, double factor, const double* from, int64_t n) {
  for (int64_t d = 0; d < n; ++d) to[d] += factor * from[d];
}

double* values_of(const RowValues& v, const Sequence& s, int64_t head) {
  return static_cast<double*>(v.data) + s.batch * v.batch + head * v.head + s.q_start;
}

// One KV head of one sequence.
class HeadGradient {
 public:
  HeadGradient(const BackwardParams& p, const Sequence& s, int64_t kv_head)
      : p_(p), s_(s), band_(p, s), kv_head_(kv_head) {}

  void run() {
    for (int64_t g = 0; g < p_.group(); ++g) {
      for (int64_t i = 0; i < s_.q_length; ++i) row(kv_head_ * p_.group() + g, i);
    }
  }

 private:
  void row(int64_t head, int64_t i) {
    const double* out = row_of<double>(p_.output, s_, s_.q_start, head, i);
    const double* grad = row_of<double>(p_.grad_output, s_, s_.q_start, head, i);
    const double lse = values_of(p_.lse, s_, head)[i];
    double delta = dot(out, grad, p_.value_dim);
    if (p_.grad_lse.data != nullptr) delta -= values_of(p_.grad_lse, s_, head)[i];
    values_of(p_.delta, s_, head)[i] = delta;
    const Interval keys = band_.keys(i);
    if (lse == -std::numeric_limits<double>::infinity()) return;
    for (int64_t j = keys.begin; j < keys.end; ++j) pair(head, i, j, lse, delta, grad);
  }

  void pair(int64_t head, int64_t i, int64_t j, double lse, double delta, const double* grad) {
    const int64_t b = s_.batch;
    const double* query = row_of<double>(p_.query, s_, s_.q_start, head, i);
    const double* key = row_of<double>(p_.key, s_, s_.k_start, kv_head_, j);
    const double* value = row_of<double>(p_.value, s_, s_.k_start, kv_head_, j);
    double score = dot(query, key, p_.head_dim) * p_.scale, slope = p_.scale;
    if (p_.softcap > 0) {
      const double t = std::tanh(score / p_.softcap);
      score = p_.softcap * t;
      slope *= 1 - t * t;
    }
    const double weight = std::exp(score + added_score(p_, b, head, i, j, s_.offset) - lse);
    double kept = 1;
    if (p_.dropout_p > 0) kept = keeps(p_, b, head, i, j) ? 1 / (1 - double(p_.dropout_p)) : 0;
    const double ds = weight * (kept * dot(grad, value, p_.value_dim) - delta);

    add_scaled(row_of<double>(p_.grad_query, s_, head, i), ds * slope, key, p_.head_dim);
    add_scaled(key_gradient(p_.grad_key, j), ds * slope, query, p_.head_dim);
    add_scaled(key_gradient(p_.grad_value, j), weight * kept, grad, p_.value_dim);
    const BiasGradient& g = p_.grad_bias;
    if (g.data != nullptr) {
      static_cast<double*>(g.data)[b * g.batch + head * g.head + i * g.row + j * g.column] += ds;
    }
  }

  double* key_gradient(const Output& m, int64_t j) const {
    return static_cast<double*>(m.data) + s_.batch * m.batch + kv_head_ * m.head +
           (s_.k_start + j) * m.row;
  }

  const BackwardParams& p_;
  const Sequence s_;
  const Band band_;
  const int64_t kv_head_;
};

void sink_gradient(const BackwardParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    for (int64_t h = 0; h < p.heads; ++h) {
      const double* lse = values_of(p.lse, s, h);
      const double* delta = values_of(p.delta, s, h);
      for (int64_t i = 0; i < s.q_length; ++i) {
        if (std::isinf(lse[i])) continue;
        static_cast<double*>(p.grad_sinks)[h] -= std::exp(p.sinks_double[h] - lse[i]) * delta[i];
      }
    }
  }
}

}  // namespace
}  // namespace attention

void attention_backward_float64(const flashkern::attention::BackwardParams& p,
                                const Threads& threads) {
  using namespace attention;
  const int64_t heads = p.batch * p.kv_heads;
  const int64_t tasks = p.grad_bias.data != nullptr ? 1 : heads;  // the bias gradient sums over all
  threads.run(tasks, [&](int64_t task, int) {
    for (int64_t i = task; i < heads; i += tasks) {
      HeadGradient(p, sequence_of(p, i / p.kv_heads), i % p.kv_heads).run();
    }
  });
  if (p.grad_sinks != nullptr) sink_gradient(p);
}

}  // namespace flashkern::FK_ISA
