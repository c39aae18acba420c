// What the backward pass needs of whole rows before the tiles: delta, and the gradient of the
// sinks.
#pragma once

#include "attention/sm80/scores.h"
#include "ptx/launch.h"

namespace flashkern::attention::sm80 {

template <class T>
FK_DEVICE const T* row_at(const Matrix& m, const Sequence& s, int64_t head, int64_t row) {
  return static_cast<const T*>(m.data) + s.batch * m.batch + head * m.head +
         (s.q_start + row) * m.row;
}

template <class X>
FK_DEVICE X warp_sum(X x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(ptx::kAllLanes, x, lanes);
  return x;
}

// delta = rowsum(dO * O) - grad_lse: what normalisation takes from every element of a row of dP.
// One warp for each row.
template <class T>
__global__ void __launch_bounds__(128) row_deltas(const BackwardParams p) {
  const int64_t index = int64_t{blockIdx.x} * 4 + ptx::warp_id();
  const int64_t row = index % p.seq_q, head = index / p.seq_q % p.heads;
  const int64_t batch = index / p.seq_q / p.heads;
  if (batch >= p.batch) return;
  const Sequence s = sequence_of(p, batch);
  if (row >= s.q_length) return;
  const T* output = row_at<T>(p.output, s, head, row);
  const T* grad = row_at<T>(p.grad_output, s, head, row);
  float sum = 0;
  for (int i = ptx::lane_id(); i < p.value_dim; i += 32) {
    sum += ptx::to_float(output[i]) * ptx::to_float(grad[i]);
  }
  sum = warp_sum(sum);
  if (ptx::lane_id() != 0) return;
  const auto at = [&](const RowValues& v) {
    return static_cast<float*>(v.data) + batch * v.batch + head * v.head + s.q_start + row;
  };
  if (p.grad_lse.data != nullptr) sum -= *at(p.grad_lse);
  *at(p.delta) = sum;
}

// A sink is a logit without a value: its gradient is its share of the softmax times -delta. One
// warp for each head, rows in one order.
inline __global__ void __launch_bounds__(32) sink_gradients(const BackwardParams p) {
  const int64_t head = blockIdx.x;
  const float sink = p.sinks[head] * static_cast<float>(kLog2e);
  double total = 0;
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    const Sequence s = sequence_of(p, batch);
    const auto row_of = [&](const RowValues& v) {
      return static_cast<const float*>(v.data) + batch * v.batch + head * v.head + s.q_start;
    };
    const float *lse = row_of(p.lse), *delta = row_of(p.delta);
    for (int64_t i = ptx::lane_id(); i < s.q_length; i += 32) {
      if (lse[i] == -INFINITY) continue;
      total -= static_cast<double>(exp2f(sink - lse[i] * static_cast<float>(kLog2e))) * delta[i];
    }
  }
  total = warp_sum(total);
  if (ptx::lane_id() == 0) static_cast<float*>(p.grad_sinks)[head] = static_cast<float>(total);
}

template <class T>
void launch_rows(const BackwardParams& p, GpuStream stream) {
  const int64_t rows = p.batch * p.heads * p.seq_q;
  if (rows > 0) ptx::launch(row_deltas<T>, {static_cast<unsigned>((rows + 3) / 4), 128}, stream, p);
  if (p.grad_sinks == nullptr) return;
  ptx::launch(sink_gradients, {static_cast<unsigned>(p.heads), 32}, stream, p);
}

}  // namespace flashkern::attention::sm80
