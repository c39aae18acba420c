// Attention forward in float64: one row at a time, one key at a time, in the order of the
// definition. For gradcheck and for tests; every feature of the float32 kernels, none of their
// speed.
#include <cmath>
#include <vector>

#include "attention/cpu/float64.h"
#include "attention/cpu/forward.h"
#include "attention/cpu/rows.h"
#include "attention/plan.h"
#include "attention/softmax.h"

namespace flashkern::FK_ISA {
namespace attention {
namespace {

class Row {
 public:
  Row(const ForwardParams& p, int64_t batch, int64_t head, int64_t query)
      : p_(p), batch_(batch), head_(head), query_(query), out_(p.value_dim) {}

  // `view`: of the call's keys, or of those that beams share.
  void attend(const HeadView& view, const double* query) {
    const Problem& p = *view.problem;
    const KeyRows<double> keys(p, p.key, view), values(p, p.value, view);
    const Interval seen = view.band.keys(query_);
    for (int64_t j = seen.begin; j < seen.end; ++j) {
      double dot = 0;
      const double* key = keys.at(j);
      for (int64_t d = 0; d < p_.head_dim; ++d) dot += query[d] * key[d];
      add(score(view, dot, j), values.at(j), j);
    }
  }

  void finish(double* out, double* lse) {
    const bool blind = state_.blind();
    double factor = p_.dropout_p < 1 ? 1 / (1 - p_.dropout_p) : 0;
    if (p_.sinks_double != nullptr) factor *= add_sink(state_, p_.sinks_double[head_] * kLog2e);
    factor *= inverse_sum(state_.sum);
    for (int64_t e = 0; e < p_.value_dim; ++e) out[e] = blind ? 0 : out_[e] * factor;
    *lse = log_sum_exp(state_);
  }

 private:
  double score(const HeadView& view, double dot, int64_t j) const {
    double s = dot * p_.scale;
    if (p_.softcap > 0) s = p_.softcap * std::tanh(s / p_.softcap);
    const int64_t earlier = view.sequence.earlier, offset = view.band.offset + earlier;
    return (s + added_score(p_, batch_, head_, query_, j + earlier, offset)) * kLog2e;
  }

  void add(double s, const double* value, int64_t j) {
    const double maximum = state_.maximum < s ? s : state_.maximum;
    const double base = exponent_base(maximum);
    const double factor = std::exp2(state_.maximum - base), weight = std::exp2(s - base);
    state_.maximum = maximum;
    state_.sum = state_.sum * factor + weight;
    const bool kept = p_.dropout_p == 0 || keeps(p_, batch_, head_, query_, j);
    for (int64_t e = 0; e < p_.value_dim; ++e) {
      out_[e] = out_[e] * factor + (kept ? weight * value[e] : 0);
    }
  }

  const ForwardParams& p_;
  int64_t batch_, head_, query_;
  RowState<double> state_;
  std::vector<double> out_;
};

}  // namespace
}  // namespace attention

void attention_forward_float64(const flashkern::attention::ForwardParams& p,
                               const Threads& threads) {
  using namespace attention;
  const ForwardParams shared = shared_part(p);
  threads.run(p.batch * p.heads, [&](int64_t task, int) {
    const int64_t b = task / p.heads, head = task % p.heads;
    const HeadView view(p, sequence_of(p, b), head / p.group());
    const HeadView prompt(shared, sequence_of(shared, b / p.beams), head / p.group());
    const Sequence& s = view.sequence;
    for (int64_t i = 0; i < s.q_length; ++i) {
      Row row(p, b, head, i);
      const double* query = row_of<double>(p.query, s, s.q_start, head, i);
      if (p.shared.key.data != nullptr) row.attend(prompt, query);
      row.attend(view, query);
      double* lse = static_cast<double*>(p.lse.data) + b * p.lse.batch + head * p.lse.head;
      row.finish(row_of<double>(p.output, s, head, i), lse + s.q_start + i);
    }
  });
}

}  // namespace flashkern::FK_ISA
