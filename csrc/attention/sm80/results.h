// From a row's accumulators to its output and lse; and, where its keys were split, to the workspace
// and from there, in the order of the keys, to the same.
#pragma once

#include "attention/sm80/plan.h"
#include "attention/sm80/products.h"
#include "attention/sm80/scores.h"

namespace flashkern::attention::sm80 {

// What the accumulators are multiplied by, for a state whose sum is whole; writes lse. `factor`:
// that of dropout.
FK_DEVICE float finish(const ForwardParams& p, float factor, const Sequence& s, int query, int head,
                       RowState<float> state, bool writes_lse) {
  const bool blind = state.blind();
  if (p.sinks != nullptr) {
    factor *= add_sink(state, p.sinks[head] * static_cast<float>(kLog2e));
  }
  if (writes_lse) {
    float* lse = static_cast<float*>(p.lse.data) + s.batch * p.lse.batch + head * p.lse.head;
    lse[s.q_start + query] = log_sum_exp(state);
  }
  return blind ? 0.0f : factor * inverse_sum(state.sum);
}

template <class T>
FK_DEVICE T* output_row(const ForwardParams& p, const Sequence& s, int query, int head) {
  return static_cast<T*>(p.output.data) + s.batch * p.output.batch + head * p.output.head +
         (s.q_start + query) * p.output.row;
}

// Two neighbours, the first at an even column: outputs are torch's own memory, rows of whole
// chunks.
template <class T>
FK_DEVICE void store_pair(T* to, float x, float y) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float2*>(to) = make_float2(x, y);
  } else {
    *reinterpret_cast<uint32_t*>(to) = ptx::pack<T>(x, y);
  }
}

// The lane's columns of row r (0: g, 1: g + 8) of a strip, each pair through store(column, x, y).
template <int N, class Store>
FK_DEVICE void for_each_pair(const float (&sums)[N][4], int r, int value_dim, Store&& store) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int column = 8 * j + static_cast<int>(ptx::lane_id()) % 4 * 2;
    if (column < value_dim) store(column, sums[j][2 * r], sums[j][2 * r + 1]);
  }
}

// A part of one row: value_dim sums, the maximum, the sum.
FK_DEVICE float* part_at(const ForwardParams& p, const ForwardPlan& plan, int batch, int kv_head,
                         int part, int row) {
  const int64_t head = batch * p.kv_heads + kv_head;
  return p.workspace + ((head * plan.parts + part) * plan.split_rows + row) * (p.value_dim + 2);
}

// That of row `index` of a block, which may be a row of a set of beams.
FK_DEVICE float* part_of(const ForwardParams& p, const ForwardPlan& plan, int kv_head, int split,
                         const Row& row, int index) {
  if (p.row_beams > 1) {
    const int group = static_cast<int>(p.group());
    index = row.query * group + row.head % group;
  }
  return part_at(p, plan, row.batch, kv_head, split, index);
}

template <class T, int N>
FK_DEVICE void write_output(const ForwardParams& p, float keep, const Sequence& s, const Row& row,
                            const RowState<float>& state, const float (&sums)[N][4], int r) {
  const float factor = finish(p, keep, s, row.query, row.head, state, ptx::lane_id() % 4 == 0);
  const bool nothing = factor == 0;  // and the sums may be NaN for all that
  T* to = output_row<T>(p, s, row.query, row.head);
  for_each_pair(sums, r, static_cast<int>(p.value_dim), [&](int column, float x, float y) {
    store_pair(to + column, nothing ? 0.0f : x * factor, nothing ? 0.0f : y * factor);
  });
}

template <int N>
FK_DEVICE void write_part(const ForwardParams& p, float* part, const RowState<float>& state,
                          const float (&sums)[N][4], int r) {
  for_each_pair(sums, r, static_cast<int>(p.value_dim),
                [&](int column, float x, float y) { store_pair(part + column, x, y); });
  if (ptx::lane_id() % 4 != 0) return;
  store_pair(part + p.value_dim, state.maximum, state.sum);
}

// One warp for each row of the workspace. Sequences whose keys were not split are done already.
template <class T>
__global__ void __launch_bounds__(128, 16)
    merge(const __grid_constant__ ForwardParams p, const __grid_constant__ ForwardPlan plan) {
  const int64_t index = int64_t{blockIdx.x} * 4 + ptx::warp_id();
  const int row = static_cast<int>(index % plan.split_rows);
  const int64_t head_index = index / plan.split_rows;
  const int kv_head = static_cast<int>(head_index % p.kv_heads);
  const int batch = static_cast<int>(head_index / p.kv_heads);
  if (batch >= p.batch) return;
  const Sequence s = sequence_of(p, batch);
  const SequenceCut cut(p.group() * s.q_length, s.k_length, plan.tile_rows, plan.split_keys);
  if (row >= cut.rows || (cut.splits == 1 && !plan.joined)) return;
  int parts = cut.splits;
  if (plan.joined) parts += shared_parts(p, s.q_length, s.earlier, plan.split_keys);

  RowState<float> state;
  for (int i = 0; i < parts; ++i) {
    const float* part = part_at(p, plan, batch, kv_head, i, row);
    state.maximum = fmaxf(state.maximum, part[p.value_dim]);
  }
  const float base = exponent_base(state.maximum);
  for (int i = 0; i < parts; ++i) {
    const float* part = part_at(p, plan, batch, kv_head, i, row);
    state.sum += part[p.value_dim + 1] * ptx::fast_exp2(part[p.value_dim] - base);
  }
  const int group = static_cast<int>(p.group());
  const int query = row / group, head = kv_head * group + row % group;
  const float factor = finish(p, plan.rule.keep, s, query, head, state, ptx::lane_id() == 0);
  T* to = output_row<T>(p, s, query, head);
  for (int column = 2 * ptx::lane_id(); column < p.value_dim; column += 64) {
    float x = 0, y = 0;
    for (int i = 0; i < parts && factor != 0; ++i) {
      const float* part = part_at(p, plan, batch, kv_head, i, row);
      const float weight = ptx::fast_exp2(part[p.value_dim] - base);
      x += part[column] * weight;
      y += part[column + 1] * weight;
    }
    store_pair(to + column, x * factor, y * factor);
  }
}

}  // namespace flashkern::attention::sm80
