// The decode kernel's task: the few query rows of one KV head (its group of heads, times one or a
// few new tokens) against one split of the cache, kDecodeKeys keys at a time:
//
//   scores [rows][128] = q K^T  ->  mask, online softmax along each row  ->  out [rows][E] += p V
//
// Each key and value is read from memory once for all rows, in place, page by page where the cache
// is paged. Everything else is a few KiB: q, scores and out stay in L1.
#pragma once

#include "attention/cpu/dot.h"
#include "attention/cpu/results.h"
#include "attention/cpu/task.h"

namespace flashkern::FK_ISA::attention {

inline constexpr int64_t kDecodeKeys = 4 * kKeyBlock;  // long runs of keys, then of values

// Keys, and then values, are read kRunRows at a time while those that lie kAheadBytes further on,
// wherever their page is, are on their way.
inline constexpr int64_t kRunRows = 16;
inline constexpr int64_t kAheadBytes = 8192;

inline int64_t whole_vectors(int64_t n) { return round_up(n, kLanes); }

// One row's scores, keys along the lanes: the passes of scores.h turned by a quarter.
class DecodeRow {
 public:
  DecodeRow(const HeadView& view, int64_t row)
      : view_(view),
        problem_(*view.problem),
        batch_(view.batch_of(row)),
        query_(view.query_of(row)),
        head_(view.head_of(row)),
        seen_(view.band.keys(query_)) {}

  // `s` has room for whole vectors; lanes past n become probabilities of 0. `spare` is as large.
  void modify(float* s, float* spare, int64_t begin, int64_t n) const {
    const int64_t count = whole_vectors(n);
    for (int64_t j = n; j < count; ++j) s[j] = 0;
    if (problem_.softcap > 0) apply_softcap(s, count, problem_.softcap);
    if (problem_.alibi_slopes != nullptr) {
      const float slope = alibi_slope(problem_, batch_, head_);
      const int64_t diagonal = query_ + view_.band.offset - begin;
      for (int64_t j = 0; j < n; ++j) {
        s[j] -= slope * std::fabs(static_cast<float>(diagonal - j));
      }
    }
    if (problem_.bias.kind != BiasKind::kNone) {
      const int64_t first = begin + view_.sequence.earlier;
      bias_row(problem_, batch_, head_, query_, first, n, 1, spare);
      for (int64_t j = 0; j < n; ++j) s[j] += spare[j];
    }
    for (int64_t j = 0; j < seen_.begin - begin && j < n; ++j) s[j] = -kInf;
    for (int64_t j = std::max<int64_t>(seen_.end - begin, 0); j < n; ++j) s[j] = -kInf;
    for (int64_t j = n; j < count; ++j) s[j] = -kInf;
  }

  // Returns the factor for what the row had accumulated.
  static float softmax(float* s, int64_t n, RowState<float>& state) {
    VecF top = broadcast(state.maximum);
    for (int64_t j = 0; j < n; j += kLanes) top = max(load(s + j), top);
    const float maximum = reduce_max(top);
    const float base = exponent_base(maximum);
    VecF total{};
    for (int64_t j = 0; j < n; j += kLanes) {
      const VecF p = exp2_below_zero(load(s + j) - base);
      total += p;
      store(s + j, p);
    }
    const float factor = std::exp2(state.maximum - base);
    state.maximum = maximum;
    state.sum = state.sum * factor + reduce_add(total);
    return factor;
  }

  // `begin` is a multiple of 4. `spare` holds the random words of n keys, rounded up.
  void drop(float* s, float* spare, int64_t begin, int64_t n) const {
    auto* words = reinterpret_cast<uint32_t*>(spare);
    philox_row(*problem_.seed, begin, n, static_cast<uint32_t>(query_),
               static_cast<uint32_t>(head_), static_cast<uint32_t>(batch_), words);
    const uint64_t threshold = dropout_threshold(problem_.dropout_p);
    for (int64_t j = 0; j < n; ++j) s[j] = words[j] >= threshold ? s[j] : 0.f;
  }

 private:
  const HeadView& view_;
  const Problem& problem_;
  int64_t batch_, query_, head_;
  Interval seen_;
};

template <class T>
class DecodeTask {
 public:
  DecodeTask(const ForwardParams& p, const HeadView& view, const TaskRange& range, Scratch& scratch)
      : p_(p),
        view_(view),
        range_(range),
        rows_(range.row_end - range.row_begin),
        query_row_(round_up(p.head_dim, kPairLanes)),
        out_row_(round_up(p.value_dim, kPairLanes)) {
    scratch.reset(rows_ * (query_row_ + out_row_ + kDecodeKeys) + kDecodeKeys + 64);
    queries_ = scratch.take(rows_ * query_row_);
    out_ = scratch.take(rows_ * out_row_);
    scores_ = scratch.take(rows_ * kDecodeKeys);
    spare_ = scratch.take(kDecodeKeys);
  }

  void run() {
    load_queries();
    std::memset(out_, 0, rows_ * out_row_ * sizeof(float));
    const Interval seen = view_.band.some_keys(view_.query_of(range_.row_begin),
                                               view_.query_of(range_.row_end - 1) + 1);
    const int64_t begin = std::max(seen.begin, range_.keys.begin) / 4 * 4;
    end_ = std::min(seen.end, range_.keys.end);
    for (int64_t j = begin; j < end_;) {
      const int64_t next = std::min((j / kDecodeKeys + 1) * kDecodeKeys, end_);
      attend(j, next);
      j = next;
    }
  }

  template <class Fn>
  void for_each_row(Fn&& fn) {
    for (int64_t r = 0; r < rows_; ++r) {
      float* out = out_ + r * out_row_;
      for (int64_t e = 0; e < out_row_; e += kPairLanes) store_pair<T>(out + e, load_pair(out + e));
      fn(range_.row_begin + r, states_[r], out);
    }
  }

 private:
  void load_queries() {
    const float factor = query_factor(p_);
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t row = range_.row_begin + r;
      const T* from = query_row<T>(p_.query, view_, view_.batch_of(row), view_.head_of(row),
                                   view_.query_of(row));
      float* to = queries_ + r * query_row_;
      along_row<T>(p_.head_dim, [&](int64_t d, auto load_query) {
        const VectorPair x = load_query(from + d);
        store(to + d, x.first * factor);
        store(to + d + kLanes, x.second * factor);
      });
    }
  }

  void attend(int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    stream(KeyRows<T>(p_, p_.key, view_), begin, end, p_.head_dim,
           [&](const StreamRows<T>& keys, int64_t j) {
             dot_scores(rows_, queries_, query_row_, keys, p_.head_dim, scores_ + (j - begin),
                        kDecodeKeys);
           });
    for (int64_t r = 0; r < rows_; ++r) {
      const DecodeRow row(view_, range_.row_begin + r);
      float* s = scores_ + r * kDecodeKeys;
      row.modify(s, spare_, begin, n);
      const float factor = DecodeRow::softmax(s, whole_vectors(n), states_[r]);
      if (p_.dropout_p > 0) row.drop(s, spare_, begin, n);
      if (factor == 1.f) continue;
      float* out = out_ + r * out_row_;
      for (int64_t e = 0; e < out_row_; e += kLanes) store(out + e, load(out + e) * factor);
    }
    stream(KeyRows<T>(p_, p_.value, view_), begin, end, p_.value_dim,
           [&](const StreamRows<T>& values, int64_t j) {
             weigh_values(rows_, scores_ + (j - begin), kDecodeKeys, values, p_.value_dim, out_,
                          out_row_);
           });
  }

  // fn(rows, the first one's number) over rows [begin, end), some at a time.
  template <class Fn>
  void stream(const KeyRows<T>& rows, int64_t begin, int64_t end, int64_t dim, Fn&& fn) const {
    const int64_t ahead = round_up(kAheadBytes / (dim * static_cast<int64_t>(sizeof(T))), kRunRows);
    for (int64_t j = begin; j < end;) {
      auto run = rows.run(j, std::min(j + kRunRows, end));
      const T* next = run.rows;  // again, where nothing lies ahead
      if (j + ahead < end_) next = rows.at(j + ahead);
      fn(StreamRows<T>{run.rows, rows.row, run.end - j, next}, j);
      j = run.end;
    }
  }

  const ForwardParams& p_;
  const HeadView& view_;
  const TaskRange& range_;
  int64_t rows_, query_row_, out_row_;
  int64_t end_ = 0;  // of the keys that the task sees
  float *queries_, *out_, *scores_, *spare_;
  RowState<float> states_[decode_rows(DType::kFloat32, false)];
};

}  // namespace flashkern::FK_ISA::attention
