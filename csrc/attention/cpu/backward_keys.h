// One task of the backward pass: a block of keys of one KV head against every row that sees it.
#pragma once

#include <atomic>
#include <memory>
#include <thread>

#include "attention/cpu/backward_tile.h"

namespace flashkern::FK_ISA::attention {

inline int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

inline float* row_values(const RowValues& v, const Sequence& s, int64_t head) {
  return static_cast<float*>(v.data) + s.batch * v.batch + head * v.head + s.q_start;
}

// Who may add to a block of rows of dQ: blocks of keys in ascending order. A task that fails before
// its turn (out of memory) abandons the whole launch, so that no other waits for it for ever.
class Tickets {
 public:
  explicit Tickets(const Problem& p)
      : heads_(p.heads),
        blocks_(blocks_of(p.seq_q, kTileRows)),
        done_(new std::atomic<int64_t>[p.batch * heads_ * blocks_]()) {}

  // Waits until the block of keys before `keys` has added its part.
  void wait(int64_t b, int64_t h, int64_t rows, int64_t keys) const {
    const std::atomic<int64_t>& done = at(b, h, rows);
    for (int spin = 0; done.load(std::memory_order_acquire) != keys; ++spin) {
      if (spin < kSpins) continue;
      if (abandoned_.load(std::memory_order_relaxed)) return;
      std::this_thread::yield();
    }
  }
  void pass(int64_t b, int64_t h, int64_t rows, int64_t keys) {
    at(b, h, rows).store(keys + 1, std::memory_order_release);
  }
  void abandon() { abandoned_.store(true, std::memory_order_relaxed); }

 private:
  static constexpr int kSpins = 256;

  std::atomic<int64_t>& at(int64_t b, int64_t h, int64_t rows) const {
    return done_[(b * heads_ + h) * blocks_ + rows];
  }
  int64_t heads_, blocks_;
  std::unique_ptr<std::atomic<int64_t>[]> done_;
  std::atomic<bool> abandoned_{false};
};

template <class T>
class KeyBlock {
 public:
  KeyBlock(const BackwardParams& p, Tickets& tickets, const Tiles& tiles, const Sequence& s,
           int64_t kv_head, int64_t block)
      : p_(p),
        tickets_(tickets),
        t_(tiles),
        s_(s),
        band_(p, s),
        kv_head_(kv_head),
        block_(block),
        begin_(block * tiles.keys),
        live_(std::clamp<int64_t>(s.k_length - begin_, 0, tiles.keys)) {}

  // `tensor_keys`: rows of this sequence's key tensor; those past its length get zeros.
  void run(int64_t tensor_keys) {
    [[maybe_unused]] const std::conditional_t<kInTiles<T>, TileScope, Nothing> amx;
    const Interval rows = band_.rows(begin_, begin_ + live_);
    if (!rows.empty()) pack();
    std::fill_n(t_.grad_keys, t_.keys * t_.head_row, 0.f);
    std::fill_n(t_.grad_values, t_.keys * t_.value_row, 0.f);
    for (int64_t g = 0; g < p_.group() && !rows.empty(); ++g) {
      const int64_t head = kv_head_ * p_.group() + g;
      for (int64_t q = (rows.end - 1) / kTileRows; q >= rows.begin / kTileRows; --q) {
        if (meets(q, block_)) tile(head, q);
      }
    }
    const int64_t n = std::min(begin_ + t_.keys, tensor_keys) - begin_;
    if (kInTiles<T> && live_ < n) {  // whole tiles were written
      std::fill_n(t_.grad_keys + live_ * t_.head_row, (n - live_) * t_.head_row, 0.f);
      std::fill_n(t_.grad_values + live_ * t_.value_row, (n - live_) * t_.value_row, 0.f);
    }
    round_rows(t_.grad_keys, t_.head_row, n, p_.head_dim, gradient_of(p_.grad_key), p_.grad_key.row,
               static_cast<float>(p_.scale));
    round_rows(t_.grad_values, t_.value_row, n, p_.value_dim, gradient_of(p_.grad_value),
               p_.grad_value.row);
  }

 private:
  // Does some row of block q see some key of block k? For one q, those k are neighbours.
  bool meets(int64_t q, int64_t k) const {
    const int64_t first = q * kTileRows, end = std::min(first + kTileRows, s_.q_length);
    const Interval keys = band_.some_keys(first, end);
    return std::max(keys.begin, k * t_.keys) < std::min(keys.end, (k + 1) * t_.keys);
  }

  T* gradient_of(const Output& m) const {
    return static_cast<T*>(m.data) + s_.batch * m.batch + kv_head_ * m.head +
           (s_.k_start + begin_) * m.row;
  }

  void pack() {
    const T* keys = row_of<T>(p_.key, s_, s_.k_start, kv_head_, begin_);
    const T* values = row_of<T>(p_.value, s_, s_.k_start, kv_head_, begin_);
    transpose_tile(keys, p_.key.row, live_, p_.head_dim, t_.keys_t, t_.score_row, query_factor(p_));
    transpose_tile(values, p_.value.row, live_, p_.value_dim, t_.values_t, t_.score_row, 1.f);
    lay_rows(keys, p_.key.row, live_, p_.head_dim, t_.keys_scaled, t_.head_row,
             static_cast<float>(p_.scale));
  }

  // Rows [begin, end) of a tile, counted from its first, and the columns [left, right) that they
  // need.
  struct Step {
    int64_t begin, end, left, right;
  };

  void tile(int64_t head, int64_t q) {
    first_ = q * kTileRows;
    rows_ = std::min(first_ + kTileRows, s_.q_length) - first_;
    const Interval all = band_.all_keys(first_, first_ + rows_);
    whole_ = all.begin <= begin_ && all.end >= begin_ + live_;
    load_rows(head);
    const int64_t grain = whole_ ? rows_ : kMaskedRows;
    const auto each_step = [&](auto&& fn) {
      for (int64_t i = 0; i < rows_; i += grain) fn(step_of(i, std::min(i + grain, rows_)));
    };
    each_step([&](const Step& c) {
      score(c);
      softmax_gradient(head, c);
    });
    if constexpr (kInPairs<T>) round_tiles();
    key_products();
    if constexpr (kInTiles<T>) each_step([&](const Step& c) { query_product(head, c); });
    if (block_ > 0 && meets(q, block_ - 1)) tickets_.wait(s_.batch, head, q, block_);
    each_step(
        [&](const Step& c) { kInTiles<T> ? add_query_product(head, c) : query_product(head, c); });
    tickets_.pass(s_.batch, head, q, block_);
  }

  Step step_of(int64_t begin, int64_t end) const {
    if (whole_) return {begin, end, 0, live_};
    const Interval keys = band_.some_keys(first_ + begin, first_ + end);
    const int64_t left = std::clamp<int64_t>(keys.begin - begin_, 0, live_);
    const int64_t right = std::clamp<int64_t>(keys.end - begin_, left, live_);
    return {begin, end, left / kGemmCols * kGemmCols, right};
  }

  // As the second operand of a product over rows.
  static void lay_rows(const T* from, int64_t from_row, int64_t rows, int64_t n, float* to,
                       int64_t to_row, float factor = 1.f) {
    if constexpr (kInPairs<T>) {
      pair_up(from, from_row, rows, n, to, to_row);
    } else {
      widen_rows(from, from_row, rows, n, to, to_row, factor);
    }
  }

  // Q and dO, as both operands: rows in pairs, or once for both.
  void load_rows(int64_t head) {
    const T* query = row_of<T>(p_.query, s_, s_.q_start, head, first_);
    const T* grad = row_of<T>(p_.grad_output, s_, s_.q_start, head, first_);
    lay_rows(query, p_.query.row, rows_, p_.head_dim, t_.query, t_.head_row);
    lay_rows(grad, p_.grad_output.row, rows_, p_.value_dim, t_.grad, t_.value_row);
    if constexpr (kInTiles<T>) {
      copy_left(query, p_.query.row, rows_, p_.head_dim, t_.query_left);
      copy_left(grad, p_.grad_output.row, rows_, p_.value_dim, t_.grad_left);
      query_ = {t_.query_left, t_.head_depth};
      grad_ = {t_.grad_left, t_.value_depth};
    } else if constexpr (kInPairs<T>) {
      query_ = {query, p_.query.row};
      grad_ = {grad, p_.grad_output.row};
    } else {
      query_ = {t_.query, t_.head_row};
      grad_ = {t_.grad, t_.value_row};
    }
    const float* lse = row_values(p_.lse, s_, head) + first_;
    for (int64_t i = 0; i < rows_; ++i) {  // a row that attends to nothing gets P = 2^-inf
      t_.lse[i] = lse[i] == -kInf ? kInf : static_cast<float>(lse[i] * kLog2e);
    }
    delta_ = row_values(p_.delta, s_, head) + first_;
  }

  // S and dP.
  void score(const Step& c) {
    const int64_t columns = pad_columns(c.right) - c.left, at = c.begin * t_.score_row + c.left;
    if (columns <= 0) return;
    const auto product = [&](const Left<T>& rows, int64_t depth, const float* keys, float* to,
                             float factor) {
      multiply<T, false>(c.end - c.begin, columns, depth,
                         {rows.data + c.begin * rows.row, rows.row}, {keys + c.left, t_.score_row},
                         to + at, t_.score_row, factor);
    };
    product(query_, p_.head_dim, t_.keys_t, t_.scores, query_factor(p_));
    product(grad_, p_.value_dim, t_.values_t, t_.grad_scores, 1);
  }

  // S becomes P (as dropout leaves it), dP becomes dS.
  void softmax_gradient(int64_t head, const Step& c) {
    const bool plain = p_.softcap == 0 && p_.alibi_slopes == nullptr &&
                       p_.bias.kind == BiasKind::kNone && p_.dropout_p == 0;
    const float unit = factor_left<T>(query_factor(p_));
    for (int64_t i = c.begin; i < c.end; ++i) {
      const Interval keys = band_.keys(first_ + i);
      const RowSpan span{c.left, pad_columns(c.right), std::max<int64_t>(keys.begin - begin_, 0),
                         std::min(keys.end - begin_, live_), pad_columns(live_)};
      float* s = t_.scores + i * t_.score_row;
      float* g = t_.grad_scores + i * t_.score_row;
      if (!whole_) clear_outside(s, g, span);
      if (!plain) {
        general_row(s, g, t_.lse[i], delta_[i], span, extras_of(head, first_ + i));
      } else if (span.first > span.begin || span.last < span.end) {
        plain_row<true>(s, g, unit, t_.lse[i], delta_[i], span);
      } else {
        plain_row<false>(s, g, unit, t_.lse[i], delta_[i], span);
      }
    }
  }

  // P and dS as operands in bfloat16.
  void round_tiles() {
    const int64_t columns = pad_columns(live_);
    round_tile(t_.grad_scores, t_.score_row, rows_, columns, t_.grad_rows);
    if constexpr (kInTiles<T>) {
      round_columns(t_.scores, t_.score_row, rows_, columns, t_.scores_left);
      round_columns(t_.grad_scores, t_.score_row, rows_, columns, t_.grads_left);
      return;
    }
    round_up_pairs(t_.scores, t_.score_row, rows_, columns);
    round_up_pairs(t_.grad_scores, t_.score_row, rows_, columns);
  }

  RowExtras extras_of(int64_t head, int64_t row) {
    RowExtras x;
    x.unit = factor_left<T>(query_factor(p_));
    if (p_.softcap > 0) x.softcap = static_cast<float>(p_.softcap * kLog2e);
    if (p_.bias.kind != BiasKind::kNone || p_.alibi_slopes != nullptr) {
      x.addend = t_.addend;
      fill_addend(head, row);
    }
    if (p_.dropout_p > 0) {
      philox_row(*p_.seed, begin_, live_, static_cast<uint32_t>(row), static_cast<uint32_t>(head),
                 static_cast<uint32_t>(s_.batch), t_.words);
      x.words = t_.words;
      x.threshold = dropout_threshold(p_.dropout_p);
      x.keep = keep_factor(p_.dropout_p);
    }
    const BiasGradient& g = p_.grad_bias;
    if (g.data != nullptr) {
      x.grad_bias = static_cast<float*>(g.data) + s_.batch * g.batch + head * g.head + row * g.row +
                    begin_ * g.column;
      x.grad_bias_step = g.column;
    }
    return x;
  }

  void fill_addend(int64_t head, int64_t row) {
    std::fill_n(t_.addend, pad_columns(live_), 0.f);
    if (p_.bias.kind != BiasKind::kNone) {
      bias_row(p_, s_.batch, head, row, begin_, live_, 1, t_.addend);
    }
    if (p_.alibi_slopes == nullptr) return;
    const float slope = alibi_slope(p_, s_.batch, head);
    const int64_t diagonal = row + s_.offset - begin_;
    for (int64_t v = 0; v < live_; v += kLanes) {
      const VecF distance = absolute(as_float(lanes_from(v - diagonal)));
      store(t_.addend + v, load(t_.addend + v) - distance * slope);
    }
  }

  // dV += P^T dO, dK += dS^T Q, for keys in steps that follow the band.
  void key_products() {
    const int64_t grain = whole_ ? live_ : kMaskedRows;
    for (int64_t j = 0; j < live_; j += grain) {
      const int64_t end = std::min(j + grain, live_);
      Interval rows = {0, rows_};
      if (!whole_) {
        rows = band_.rows(begin_ + j, begin_ + end);
        rows = {std::max<int64_t>(rows.begin - first_, 0), std::min(rows.end - first_, rows_)};
      }
      if (rows.empty()) continue;
      // Whole steps of a sum: P and dS are zeros outside the band.
      constexpr int64_t kUnit = kInTiles<T> ? kTileDepth : kStep<T>;
      const int64_t first = rows.begin / kUnit * kUnit, at = first / kStep<T>;
      const auto product = [&](const Left<T>& left, const float* right, int64_t row, int64_t n,
                               float* sums) {
        multiply<T, true>(end - j, n, rows.end - first, left, {right + at * row, row},
                          sums + j * row, row);
      };
      product(transposed(t_.scores, t_.scores_left, first, j), t_.grad, t_.value_row, p_.value_dim,
              t_.grad_values);
      product(transposed(t_.grad_scores, t_.grads_left, first, j), t_.query, t_.head_row,
              p_.head_dim, t_.grad_keys);
    }
  }

  // A tile of scores from row `first` and key j on, with keys for rows.
  Left<T> transposed(const float* scores, const BFloat16* left, int64_t first, int64_t j) const {
    if constexpr (kInTiles<T>) return {left + j * kTileRows + first, kTileRows};
    const int64_t at = first / kStep<T> * t_.score_row + j;
    return {reinterpret_cast<const Factor<T>*>(scores + at), kStep<T>, kStep<T> * t_.score_row};
  }

  // dQ += dS (scale K), in place; a product of tiles waits beside it for its turn.
  void query_product(int64_t head, const Step& c) {
    if (c.right <= c.left) return;
    const int64_t at = c.begin * t_.score_row + c.left, row = t_.head_row;
    Left<T> left{nullptr, t_.score_row};
    if constexpr (kInPairs<T>) {
      left.data = t_.grad_rows + at;
    } else {
      left.data = t_.grad_scores + at;
    }
    const Right right{t_.keys_scaled + c.left / kStep<T> * row, row};
    const int64_t rows = c.end - c.begin, keys = c.right - c.left;
    if constexpr (kInTiles<T>) {
      multiply<T, false>(rows, p_.head_dim, keys, left, right, t_.query_product + c.begin * row,
                         row);
    } else {
      multiply<T, true>(rows, p_.head_dim, keys, left, right, query_sums(head, c.begin),
                        p_.query_sums.row, static_cast<float>(p_.scale));
    }
  }

  void add_query_product(int64_t head, const Step& c) {
    if (c.right <= c.left) return;
    const VecF scale = broadcast(static_cast<float>(p_.scale));
    for (int64_t i = c.begin; i < c.end; ++i) {
      const float* from = t_.query_product + i * t_.head_row;
      float* to = query_sums(head, i);
      int64_t d = 0;
      for (; d + kLanes <= p_.head_dim; d += kLanes) {
        store(to + d, fma(load(from + d), scale, load(to + d)));
      }
      const int tail = static_cast<int>(p_.head_dim - d);
      if (tail > 0) {
        store_partial(to + d, fma(load(from + d), scale, load_partial(to + d, tail)), tail);
      }
    }
  }

  float* query_sums(int64_t head, int64_t row) const {
    return row_of<float>(p_.query_sums, s_, head, first_ + row);
  }

  const BackwardParams& p_;
  Tickets& tickets_;
  const Tiles& t_;
  const Sequence s_;
  const Band band_;
  const int64_t kv_head_, block_, begin_, live_;  // keys [begin_, begin_ + live_)

  // The tile in hand: rows [first_, first_ + rows_); whole_: every row sees every key.
  int64_t first_ = 0, rows_ = 0;
  bool whole_ = false;
  const float* delta_ = nullptr;
  Left<T> query_{}, grad_{};
};

}  // namespace flashkern::FK_ISA::attention
