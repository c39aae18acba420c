// What the backward pass needs of whole rows before the tiles: their numbers, zeros where a row
// sees no key, and the gradient of the sinks.
#pragma once

#include "attention/sm80/backward_plan.h"
#include "attention/sm80/gradient.h"
#include "attention/sm80/plan.h"
#include "ptx/launch.h"

namespace flashkern::attention::sm80 {

// 8 neighbours, as float32; `aligned`: to 16 bytes.
template <class T>
FK_DEVICE void load_eight(const T* from, bool aligned, float (&x)[8]) {
  alignas(16) T eight[8];
  if (aligned) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(eight) / 16); ++i) {
      reinterpret_cast<uint4*>(eight)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) eight[i] = from[i];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = ptx::to_float(eight[i]);
}

template <class M>
FK_DEVICE int64_t row_at(const M& m, const Sequence& s, int64_t head, int64_t row) {
  return s.batch * m.batch + head * m.head + (s.q_start + row) * m.row;
}

// delta = rowsum(dO * O) - grad_lse: what normalisation takes from every element of a row of dP.
// 8 lanes for each row, 8 elements of it at a time. A block has kDeltaRows of one (batch, head).
template <class T>
class RowDeltas {
 public:
  FK_DEVICE RowDeltas(const BackwardParams& p, const BackwardPlan& plan, const Sequence& s,
                      int64_t head, bool aligned)
      : p_(p), plan_(plan), s_(s), head_(head), aligned_(aligned) {}

  // Of the row whose first of 8 lanes it is; the row's numbers go to the workspace.
  FK_DEVICE float run(int64_t row) const {
    const int lane = static_cast<int>(ptx::lane_id()) % 8;
    const bool there = row < s_.q_length;
    float sum = there ? product(row, lane) : 0.0f;
    for (int lanes = 4; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ptx::kAllLanes, sum, lanes);
    if (!there) return 0;
    if (Band(p_, s_).keys(row).empty()) clear(row, lane);
    if (lane != 0) return 0;
    const float lse = *value_at(p_.lse, row);
    if (p_.grad_lse.data != nullptr) sum -= *value_at(p_.grad_lse, row);
    const bool blind = lse == -INFINITY;
    const float log2_lse = blind ? INFINITY : lse * static_cast<float>(kLog2e);
    numbers()[row * p_.group()] = {log2_lse, blind ? 0.0f : sum};
    return p_.sinks == nullptr || blind ? 0 : sink_gradient(log2_lse, sum);
  }

 private:
  FK_DEVICE float product(int64_t row, int lane) const {
    const T* output = static_cast<const T*>(p_.output.data) + row_at(p_.output, s_, head_, row);
    const T* grad =
        static_cast<const T*>(p_.grad_output.data) + row_at(p_.grad_output, s_, head_, row);
    float sum = 0;
    for (int column = 8 * lane; column < p_.value_dim; column += 64) {
      float x[8], y[8];
      load_eight(output + column, aligned_, x);
      load_eight(grad + column, aligned_, y);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += x[i] * y[i];
    }
    return sum;
  }

  // A sink is a logit without a value: its gradient is its share of the softmax times -delta.
  FK_DEVICE float sink_gradient(float lse, float delta) const {
    return -ptx::fast_exp2(p_.sinks[head_] * static_cast<float>(kLog2e) - lse) * delta;
  }

  FK_DEVICE void clear(int64_t row, int lane) const {
    T* grad = static_cast<T*>(p_.grad_query.data) + row_at(p_.grad_query, s_, head_, row);
    for (int column = lane; column < p_.head_dim; column += 8) grad[column] = T{};
  }

  FK_DEVICE const float* value_at(const RowValues& v, int64_t row) const {
    return static_cast<const float*>(v.data) + s_.batch * v.batch + head_ * v.head + s_.q_start +
           row;
  }

  FK_DEVICE RowNumbers* numbers() const {
    const int64_t group = p_.group();
    return plan_.numbers(p_, s_, head_ / group) + head_ % group;
  }

  const BackwardParams& p_;
  const BackwardPlan& plan_;
  const Sequence& s_;
  int64_t head_;
  bool aligned_;
};

FK_DEVICE int64_t sink_part(const BackwardParams& p, const BackwardPlan& plan, int64_t head) {
  return plan.sinks + head * p.batch * plan.delta_blocks * kDeltaWarps;
}

template <class T>
__global__ void __launch_bounds__(32 * kDeltaWarps)
    row_deltas(const __grid_constant__ BackwardParams p, const __grid_constant__ BackwardPlan plan,
               const bool aligned) {
  const int64_t block = blockIdx.x % plan.delta_blocks, index = blockIdx.x / plan.delta_blocks;
  const int64_t head = index % p.heads, batch = index / p.heads;
  const Sequence s = sequence_of(p, batch);
  const RowDeltas<T> deltas(p, plan, s, head, aligned);
  const int lane = static_cast<int>(ptx::lane_id()), warp = static_cast<int>(ptx::warp_id());
  constexpr int kWarpRows = kDeltaRows / kDeltaWarps;
  const int64_t first = block * kDeltaRows + warp * kWarpRows + lane / 8;
  float sink = 0;
  for (int i = 0; i < kWarpRows; i += 4) sink += deltas.run(first + i);
  if (p.grad_sinks == nullptr) return;
  for (int lanes = 16; lanes > 0; lanes /= 2) sink += __shfl_xor_sync(ptx::kAllLanes, sink, lanes);
  const int64_t part = (batch * plan.delta_blocks + block) * kDeltaWarps + warp;
  if (lane == 0) p.workspace[sink_part(p, plan, head) + part] = sink;
}

// One warp for each head sums what the warps of row_deltas left, in one order.
inline __global__ void __launch_bounds__(32)
    sink_gradients(const __grid_constant__ BackwardParams p,
                   const __grid_constant__ BackwardPlan plan) {
  const int64_t head = blockIdx.x;
  const float* parts = p.workspace + sink_part(p, plan, head);
  const int64_t count = p.batch * plan.delta_blocks * kDeltaWarps;
  double total = 0;
  for (int64_t i = ptx::lane_id(); i < count; i += 32) total += parts[i];
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    total += __shfl_xor_sync(ptx::kAllLanes, total, lanes);
  }
  if (ptx::lane_id() == 0) static_cast<float*>(p.grad_sinks)[head] = static_cast<float>(total);
}

template <class T>
void launch_rows(const BackwardParams& p, const BackwardPlan& plan, GpuStream stream) {
  const bool aligned = rows_aligned(p.output, sizeof(T)) && rows_aligned(p.grad_output, sizeof(T));
  const int64_t blocks = p.batch * p.heads * plan.delta_blocks;
  if (blocks > 0) {
    ptx::launch(row_deltas<T>, {static_cast<unsigned>(blocks), 32 * kDeltaWarps}, stream, p, plan,
                aligned);
  }
  if (p.grad_sinks == nullptr) return;
  ptx::launch(sink_gradients, {static_cast<unsigned>(p.heads), 32}, stream, p, plan);
}

}  // namespace flashkern::attention::sm80
