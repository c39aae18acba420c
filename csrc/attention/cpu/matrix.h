// The matrix kernel's task: up to kMaxTaskRows query rows of one KV head against one run of keys.
//
// Memory of a thread (floats; D = head_dim, E = value_dim, M = rows of the task):
//   queries   D x M     packed once, transposed, times scale * log2(e) unless in pairs
//   out       E x M     accumulators, transposed too
//   scores    128 x kPanel, twice where there is a bias
//   rows      kPanel x E, finished rows
//   staged    128 x D keys and 128 x E values that cannot be multiplied where they lie: those of
//             16 bits, in pages, and values in pairs or for tiles (stage.h)
// With D = E = 64 and M = 128 that is 80 KiB beside 64 KiB of keys and values, and twice as much
// with D = E = 128: half of an L2 of 512 KiB. Pairs take half of the queries' room, and M may be
// 256. Scores never leave L1.
#pragma once

#include "attention/cpu/panel.h"
#include "attention/cpu/results.h"
#include "attention/cpu/stage.h"
#include "attention/cpu/task.h"

namespace flashkern::FK_ISA::attention {

template <class T>
class MatrixTask {
 public:
  MatrixTask(const ForwardParams& p, const HeadView& view, const TaskRange& range, Scratch& scratch)
      : p_(p), view_(view), range_(range) {
    panels_ = static_cast<int>(ceil_div(range.row_end - range.row_begin, kPanel));
    query_size_ = padded_depth<T>(p.head_dim) / kStep<T> * kPanel;
    const bool bias = p.bias.kind != BiasKind::kNone;
    const int64_t tile = kKeyBlock * kPanel;
    row_size_ = round_up(p.value_dim, kLanes);
    out_size_ = row_size_ * kPanel;
    const int64_t keys = staged_keys<T>(p.head_dim), values = staged_values<T>(p.value_dim);
    scratch.reset(panels_ * (query_size_ + out_size_) + 2 * tile + kPanel * row_size_ + keys +
                  values);
    queries_ = scratch.take(panels_ * query_size_);
    out_ = scratch.take(panels_ * out_size_);
    out_rows_ = scratch.take(kPanel * row_size_);
    tile_.scores = scratch.take(tile);
    tile_.bias = bias ? scratch.take(tile) : nullptr;
    staged_keys_ = scratch.take(keys);
    staged_values_ = scratch.take(values);
  }

  void run() {
    [[maybe_unused]] const std::conditional_t<kInTiles<T>, TileScope, Nothing> amx;
    for (int i = 0; i < panels_; ++i) {
      rows_[i].set(view_, range_.row_begin + i * kPanel, range_.row_end);
      states_[i].reset();
      pack_queries<T>(view_, rows_[i], query_factor(p_), queries(i));
    }
    const Interval seen =
        view_.band.some_keys(rows_[0].first_query, rows_[panels_ - 1].last_query + 1);
    const int64_t begin = std::max(seen.begin, range_.keys.begin);
    const int64_t end = std::min(seen.end, range_.keys.end);
    for (int64_t j = begin / kKeyBlock * kKeyBlock; j < end; j += kKeyBlock) {
      attend_block(j, std::min(j + kKeyBlock, end));
    }
  }

  // fn(row, state, accumulators) for every row of the task.
  template <class Fn>
  void for_each_row(Fn&& fn) {
    for (int i = 0; i < panels_; ++i) {
      turn_out(i);
      for (int lane = 0; lane < rows_[i].count; ++lane) {
        const RowState<float> state{states_[i].maximum[lane], states_[i].sum[lane]};
        fn(range_.row_begin + i * kPanel + lane, state, out_rows_ + lane * row_size_);
      }
    }
  }

 private:
  void attend_block(int64_t begin, int64_t end) {
    // Starts at a multiple of 4 keys, for the dropout's counters.
    const int64_t first = std::max(view_.band.first_key(rows_[0].first_query), begin) / 4 * 4;
    const KeyRows<T> keys(p_, p_.key, view_), values(p_, p_.value, view_);
    const KeyTile<T> tile{stage_keys<T>(keys, first, end, p_.head_dim, staged_keys_),
                          stage_values<T>(values, first, end, p_.value_dim, staged_values_), first};
    for (int i = 0; i < panels_; ++i) {
      const Interval seen = view_.band.some_keys(rows_[i].first_query, rows_[i].last_query + 1);
      const int64_t from = std::max(seen.begin / 4 * 4, first), to = std::min(seen.end, end);
      if (from >= to) continue;
      attend_panel(view_, rows_[i], tile, from, to, queries(i), states_[i], out(i), tile_);
    }
  }

  // The accumulators of panel i, [value_dim][kPanel], become rows.
  void turn_out(int i) {
    for (int64_t e = 0; e < p_.value_dim; e += kLanes) {
      for (int v = 0; v < kPanel; v += kLanes) {
        const auto column = [&](int64_t lane) { return out(i) + (e + lane) * kPanel + v; };
        transpose_rows(column, p_.value_dim - e, kLanes, 1.f, out_rows_ + v * row_size_ + e,
                       row_size_);
      }
    }
  }

  float* queries(int i) { return queries_ + i * query_size_; }
  float* out(int i) { return out_ + i * out_size_; }

  const ForwardParams& p_;
  const HeadView& view_;
  const TaskRange& range_;
  int panels_;
  int64_t query_size_, out_size_, row_size_;
  PanelRows rows_[kMaxTaskRows / kPanel];
  PanelState states_[kMaxTaskRows / kPanel];
  float *queries_, *out_, *out_rows_, *staged_keys_, *staged_values_;
  PanelScratch tile_;
};

}  // namespace flashkern::FK_ISA::attention
