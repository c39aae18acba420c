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

// A part of one row; the next part of it lies as many rows further on as the sequence has.
FK_DEVICE float* part_at(const ForwardParams& p, const ForwardPlan& plan, const Sequence& s,
                         int64_t batch, int kv_head, int part, int row) {
  const int64_t first = kv_head * plan.head_rows + plan.first_row(p, batch, s.k_start);
  return p.workspace + (first + part * p.group() * s.q_length + row) * part_floats(p);
}

// That of row `index` of a block, which may be a row of a set of beams.
FK_DEVICE float* part_of(const ForwardParams& p, const ForwardPlan& plan, const Sequence& s,
                         int kv_head, int split, const Row& row, int index) {
  if (p.row_beams > 1) {
    const int group = static_cast<int>(p.group());
    index = row.query * group + row.head % group;
  }
  return part_at(p, plan, s, row.batch, kv_head, split, index);
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

// The parts of one row.
struct Parts {
  const float* first;
  int64_t step;
  int count, value_dim;

  FK_DEVICE const float* operator()(int i) const { return first + i * step; }
  FK_DEVICE float maximum(int i) const { return (*this)(i)[value_dim]; }
  FK_DEVICE float sum(int i) const { return (*this)(i)[value_dim + 1]; }
};

// Of all its parts, by a whole warp.
FK_DEVICE RowState<float> state_of(const Parts& parts) {
  RowState<float> whole;
  const int lane = static_cast<int>(ptx::lane_id());
  for (int i = lane; i < parts.count; i += 32)
    whole.maximum = fmaxf(whole.maximum, parts.maximum(i));
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    whole.maximum = fmaxf(whole.maximum, __shfl_xor_sync(ptx::kAllLanes, whole.maximum, lanes));
  }
  const float base = exponent_base(whole.maximum);
  for (int i = lane; i < parts.count; i += 32) {
    whole.sum += parts.sum(i) * ptx::fast_exp2(parts.maximum(i) - base);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    whole.sum += __shfl_xor_sync(ptx::kAllLanes, whole.sum, lanes);
  }
  return whole;
}

// The weighted sum of parts [begin, end), four columns a lane from `column` on, by a whole warp: a
// lane has the weight of a part, and many loads are under way at once.
FK_DEVICE float4 sum_of(const Parts& parts, int begin, int end, float base, int column) {
  float4 sum = {};
  const int lane = static_cast<int>(ptx::lane_id());
  for (int first = begin; first < end; first += 32) {
    const int count = min(end - first, 32);
    const float weight = lane < count ? ptx::fast_exp2(parts.maximum(first + lane) - base) : 0.0f;
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      const float factor = __shfl_sync(ptx::kAllLanes, weight, i);
      if (column >= parts.value_dim) continue;
      const float4 x = *reinterpret_cast<const float4*>(parts(first + i) + column);
      sum.x += x.x * factor, sum.y += x.y * factor;
      sum.z += x.z * factor, sum.w += x.w * factor;
    }
  }
  return sum;
}

inline constexpr int kMergeWarps = 4;
struct MergeStorage {
  alignas(16) float sums[kMergeWarps][256];  // by column
};

// A block for each row of the workspace. Each warp has an equal share of the row's parts, and the
// shares are added in their order: what a row gets depends on the number of its parts alone.
// Sequences whose keys were not split are done already.
template <class T>
__global__ void __launch_bounds__(32 * kMergeWarps, 8)
    merge(const __grid_constant__ ForwardParams p, const __grid_constant__ ForwardPlan plan) {
  const int row = static_cast<int>(blockIdx.x % plan.split_rows);
  const int head_index = static_cast<int>(blockIdx.x / plan.split_rows);
  const int kv_heads = static_cast<int>(p.kv_heads), kv_head = head_index % kv_heads;
  const Sequence s = sequence_of(p, head_index / kv_heads);
  const SequenceCut cut(p.group() * s.q_length, 1, s.k_length, plan.tile_rows, plan.split_keys);
  if (row >= cut.rows || (cut.splits == 1 && !plan.joined)) return;
  int count = cut.splits;
  if (plan.joined) count += shared_parts(p, s.q_length, s.earlier, plan.split_keys);
  const Parts parts{part_at(p, plan, s, s.batch, kv_head, 0, row), cut.rows * part_floats(p), count,
                    static_cast<int>(p.value_dim)};

  auto& shared = ptx::shared_storage<MergeStorage>();
  const RowState<float> state = state_of(parts);
  const int warp = static_cast<int>(ptx::warp_id()), share = (count - 1) / kMergeWarps + 1;
  const int begin = min(warp * share, count), end = min(begin + share, count);
  for (int first = 0; first < parts.value_dim; first += 128) {
    const int column = first + 4 * static_cast<int>(ptx::lane_id());
    const float4 sum = sum_of(parts, begin, end, exponent_base(state.maximum), column);
    *reinterpret_cast<float4*>(shared.sums[warp] + column) = sum;
  }
  __syncthreads();
  const int column = 2 * static_cast<int>(threadIdx.x), group = static_cast<int>(p.group());
  const int query = row / group, head = kv_head * group + row % group;
  const float factor = finish(p, plan.rule.keep, s, query, head, state, threadIdx.x == 0);
  if (column >= parts.value_dim) return;
  float x = 0, y = 0;
  for (const auto& sums : shared.sums) x += sums[column], y += sums[column + 1];
  const bool nothing = factor == 0;  // and the sums may be NaN for all that
  store_pair(output_row<T>(p, s, query, head) + column, nothing ? 0.0f : x * factor,
             nothing ? 0.0f : y * factor);
}

}  // namespace flashkern::attention::sm80
