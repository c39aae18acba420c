// The backward pass of attention with mma.sync, for sm_80 and newer: one kernel, launched once for
// each of dV, dK and dQ.
//
//   P  = 2^(scale log2e Q K^T - log2e lse)     dP = dO V^T     dS = P * (dP - delta)
//   dV = P^T dO        dK = scale dS^T Q       dQ = scale dS K       dbias = dS
//
//   block   16 kWarps rows of the gradient of one KV head: keys (dV, dK) or packed query rows (dQ).
//           It meets tiles of the other side, those alone that the mask lets it see; a key meets
//           the rows of all heads of its group, so that dK and dV need no sum across blocks
//   warp    16 rows against every column of a tile; three products of forward's kind:
//             S = rows.a columns.a^T     dP = rows.b columns.b^T     sums += (P or dS) columns
//                 rows: a, b     columns: a, b
//             dQ  Q, dO          K, V
//             dK  K, V           Q, dO
//             dV  K              Q, dO      no dP
//   memory  two tiles of rows, up to 64 KiB; two of columns, up to 32 KiB: 96 KiB at most
//   pipe    columns.b is copied during S; blocks that share a multiprocessor hide the rest
//   numbers float32 sums in one order: the same bits every time, no atomics. P and dS are rounded
//   to
//           the tensors' type before they multiply. One gradient a launch costs 8 products in place
//           of 5, and leaves registers for one set of sums: no spills up to head_dim 256
//
// Dao: FlashAttention-2 (2023), section 3.1.2.
#pragma once

#include "attention/gpu.h"
#include "attention/sm80/gradient.h"
#include "attention/sm80/plan.h"
#include "attention/sm80/products.h"
#include "attention/sm80/results.h"
#include "ptx/launch.h"

namespace flashkern::attention::sm80 {

enum class Gradient { kValue, kKey, kQuery };

template <class T, int kDim>
struct BackwardStorage {
  static constexpr int kColumns = tile_keys(kDim * sizeof(T));
  static constexpr int kWarps = most_warps(kDim * sizeof(T));

  Tile<T, 16 * kWarps, kDim> rows_a, rows_b;
  Tile<T, kColumns, kDim> columns_a, columns_b;
  GradientRow column_rows[kColumns];  // where the columns are query rows
};

template <class T, int kDim, Gradient kWhat>
class BackwardBlock {
 public:
  using Shared = BackwardStorage<T, kDim>;
  static constexpr int kColumns = Shared::kColumns, kRows = 16 * Shared::kWarps;
  static constexpr bool kByQueries = kWhat == Gradient::kQuery;
  using Multiply = Products<T, kDim, kColumns>;

  FK_DEVICE BackwardBlock(const BackwardParams& p, const Sequence& s, int kv_head, int begin,
                          bool aligned)
      : p_(p),
        s_(s),
        rule_(p, s),
        shared_(ptx::shared_storage<Shared>()),
        keys_(p, p.key, s, kv_head),
        values_(p, p.value, s, kv_head),
        queries_(p, p.query, s, kv_head),
        grads_(p, p.grad_output, s, kv_head),
        kv_head_(kv_head),
        query_rows_(static_cast<int>(p.group() * s.q_length)),
        begin_(begin),
        row_(begin + static_cast<int>(ptx::warp_id()) * 16 + static_cast<int>(ptx::lane_id()) / 4),
        aligned_(aligned) {
    if constexpr (kByQueries) {
      for (int r = 0; r < 2; ++r) {
        rows_[r] = make_gradient_row(p, s, kv_head, row_ + 8 * r, query_rows_);
      }
    }
  }

  FK_DEVICE void run() {
    const Interval columns = seen();
    if (columns.empty()) return;
    copy_rows();
    const int end = static_cast<int>(columns.end);
    for (int first = static_cast<int>(columns.begin) / kColumns * kColumns; first < end;
         first += kColumns) {
      copy_columns(first, end);
      step(first);
      __syncthreads();  // nobody reads these columns any more
    }
  }

  FK_DEVICE void write() {
    constexpr bool kOfValue = kWhat == Gradient::kValue;
    const float scale = kOfValue ? 1.0f : static_cast<float>(p_.scale);
    const int dim = static_cast<int>(kOfValue ? p_.value_dim : p_.head_dim);
    for (int r = 0; r < 2; ++r) {
      const int row = row_ + 8 * r;
      if (row >= (kByQueries ? query_rows_ : s_.k_length)) continue;
      T* to = gradient_row(r, row);
      for_each_pair<kDim>(sums_, r, dim, [&](int column, float x, float y) {
        store_pair(to + column, x * scale, y * scale);
      });
    }
  }

 private:
  // Columns that some row of the block meets.
  FK_DEVICE Interval seen() const {
    const Band band(p_, s_);
    const int64_t group = p_.group();
    if constexpr (kByQueries) {
      const int last = min(begin_ + kRows, query_rows_) - 1;
      return band.some_keys(begin_ / group, last / group + 1);
    } else {
      const Interval rows = band.rows(begin_, begin_ + kRows);
      return {rows.begin * group, rows.end * group};
    }
  }

  FK_DEVICE void copy_rows() {
    const int dim = static_cast<int>(p_.head_dim), value_dim = static_cast<int>(p_.value_dim);
    if constexpr (kByQueries) {
      copy_tile(shared_.rows_a, queries_, begin_, query_rows_, dim, aligned_);
      copy_tile(shared_.rows_b, grads_, begin_, query_rows_, value_dim, aligned_);
    } else {
      const int keys = static_cast<int>(s_.k_length);
      copy_tile(shared_.rows_a, keys_, begin_, keys, dim, aligned_);
      if (kWhat == Gradient::kKey) {
        copy_tile(shared_.rows_b, values_, begin_, keys, value_dim, aligned_);
      }
    }
  }

  FK_DEVICE void copy_columns(int first, int end) {
    const int dim = static_cast<int>(p_.head_dim), value_dim = static_cast<int>(p_.value_dim);
    if constexpr (kByQueries) {
      copy_tile(shared_.columns_a, keys_, first, end, dim, aligned_);
      ptx::copy_commit();
      copy_tile(shared_.columns_b, values_, first, end, value_dim, aligned_);
    } else {
      copy_tile(shared_.columns_a, queries_, first, end, dim, aligned_);
      ptx::copy_commit();
      copy_tile(shared_.columns_b, grads_, first, end, value_dim, aligned_);
      for (int i = threadIdx.x; i < kColumns; i += blockDim.x) {
        shared_.column_rows[i] = make_gradient_row(p_, s_, kv_head_, first + i, end);
      }
    }
    ptx::copy_commit();
  }

  FK_DEVICE void step(int first) {
    const int row = static_cast<int>(ptx::warp_id()) * 16;
    const int dim = static_cast<int>(p_.head_dim), value_dim = static_cast<int>(p_.value_dim);
    float x[kColumns / 8][4] = {}, y[kColumns / 8][4] = {};
    ptx::copy_wait<1>();
    __syncthreads();
    Multiply::scores(x, shared_.rows_a, row, shared_.columns_a, dim);
    ptx::copy_wait<0>();
    __syncthreads();
    if constexpr (kWhat != Gradient::kValue) {
      Multiply::scores(y, shared_.rows_b, row, shared_.columns_b, value_dim);
    }
    differentiate(x, y, first);
    if constexpr (kWhat == Gradient::kValue) {
      Multiply::output(sums_, x, shared_.columns_b, value_dim);
    } else {
      Multiply::output(sums_, y, shared_.columns_a, dim);
    }
  }

  FK_DEVICE void differentiate(float (&x)[kColumns / 8][4], float (&y)[kColumns / 8][4],
                               int first) {
    const int pair = static_cast<int>(ptx::lane_id()) % 4 * 2;
    const uint32_t kept = keep_mask(first);
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * j + pair + i % 2;
        const bool keep = kept >> (4 * j + i) & 1;
        if constexpr (kByQueries) {
          const GradientRow& row = rows_[i / 2];
          const int key = first + column;
          const float of_bias = rule_.template apply<T>(p_, row, key, keep, x[j][i], y[j][i]);
          if (p_.grad_bias.data != nullptr) write_bias(row, key, of_bias);
        } else {
          const GradientRow& row = shared_.column_rows[column];
          rule_.template apply<T>(p_, row, row_ + i / 2 * 8, keep, x[j][i], y[j][i]);
        }
      }
    }
  }

  // A bit for each element of x. A loop that stays rolled up: see drop in scores.h.
  FK_DEVICE uint32_t keep_mask(int first) const {
    if (rule_.threshold == 0) return ~0u;
    const int pair = static_cast<int>(ptx::lane_id()) % 4 * 2;
    uint32_t mask = 0;
#pragma unroll 1
    for (int i = 0; i < kColumns / 2; ++i) {
      const int column = i / 4 * 8 + pair + i % 2, lower = i & 2;
      int query, head, key;
      if constexpr (kByQueries) {
        query = lower ? rows_[1].query : rows_[0].query;
        head = lower ? rows_[1].head : rows_[0].head;
        key = first + column;
      } else {
        query = shared_.column_rows[column].query;
        head = shared_.column_rows[column].head;
        key = row_ + lower * 4;
      }
      const bool keep = kept(p_, rule_.threshold, rule_.batch, head, query, key);
      mask |= static_cast<uint32_t>(keep) << i;
    }
    return mask;
  }

  // Every element of a whole (batch, heads, rows, keys) is one lane's own; it starts as zeros.
  FK_DEVICE void write_bias(const GradientRow& row, int key, float x) const {
    if (key < row.first_key || key >= row.end_key) return;
    const BiasGradient& g = p_.grad_bias;
    static_cast<float*>(
        g.data)[s_.batch * g.batch + row.head * g.head + row.query * g.row + key * g.column] = x;
  }

  FK_DEVICE T* gradient_row(int r, int row) const {
    if constexpr (kByQueries) {
      const Output& g = p_.grad_query;
      return static_cast<T*>(g.data) + s_.batch * g.batch + rows_[r].head * g.head +
             (s_.q_start + rows_[r].query) * g.row;
    } else {
      const Output& g = kWhat == Gradient::kKey ? p_.grad_key : p_.grad_value;
      return static_cast<T*>(g.data) + s_.batch * g.batch + kv_head_ * g.head +
             (s_.k_start + row) * g.row;
    }
  }

  const BackwardParams& p_;
  const Sequence& s_;
  GradientRule rule_;
  Shared& shared_;
  KeyRows<T> keys_, values_;
  QueryRows<T> queries_, grads_;
  int kv_head_, query_rows_, begin_, row_;
  bool aligned_;
  GradientRow rows_[2];
  Out<kDim> sums_ = {};
};

// One block at least: left to itself, ptxas spills to fit more of them.
template <class T, int kDim, Gradient kWhat>
__global__ void __launch_bounds__(32 * BackwardStorage<T, kDim>::kWarps, 1)
    backward(const __grid_constant__ BackwardParams p, const int blocks, const bool aligned) {
  using Block = BackwardBlock<T, kDim, kWhat>;
  const int64_t head = blockIdx.x / blocks;
  const int begin = static_cast<int>(blockIdx.x % blocks) * Block::kRows;
  const Sequence s = sequence_of(p, head / p.kv_heads);
  if (begin >= (Block::kByQueries ? p.group() * s.q_length : s.k_length)) return;
  Block block(p, s, static_cast<int>(head % p.kv_heads), begin, aligned);
  block.run();
  block.write();
}

template <class T, int kDim, Gradient kWhat>
void launch_gradient(const BackwardParams& p, int64_t rows, GpuStream stream) {
  using Shared = BackwardStorage<T, kDim>;
  const int tile = 16 * Shared::kWarps;
  const int blocks = static_cast<int>((rows + tile - 1) / tile);
  const int64_t all = p.batch * p.kv_heads * blocks;
  if (all == 0) return;
  bool aligned = true;
  for (const Matrix* m : {&p.query, &p.key, &p.value, &p.grad_output}) {
    aligned = aligned && rows_aligned(*m, sizeof(T));
  }
  ptx::launch(backward<T, kDim, kWhat>,
              {static_cast<unsigned>(all), 32u * Shared::kWarps, sizeof(Shared)}, stream, p, blocks,
              aligned);
}

template <class T, int kDim>
void launch_gradients(const BackwardParams& p, GpuStream stream) {
  launch_gradient<T, kDim, Gradient::kValue>(p, p.seq_k, stream);
  launch_gradient<T, kDim, Gradient::kKey>(p, p.seq_k, stream);
  launch_gradient<T, kDim, Gradient::kQuery>(p, p.group() * p.seq_q, stream);
}

}  // namespace flashkern::attention::sm80
