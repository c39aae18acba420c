// Attention forward with mma.sync, for sm_80 and newer: output = softmax(mask(Q K^T)) V and lse.
//
//   block   16 kWarps query rows of one KV head of one sequence: the heads of its group packed
//           query by query, so that one read of a key serves them all. Warp w owns rows
//           16 w .. 16 w + 15 against every key; warps meet only where tiles change hands
//   keys    in tiles of kKeys, 64 to 16, those alone that some row of the block sees; where a
//           sequence has few rows its keys are split among blocks and a second kernel merges
//   memory  Q (up to 32 KiB) | K, V: two stages of up to 16 KiB each; at most 96 KiB. 16-byte
//           chunks are swizzled, tails of rows and columns are zeros
//   pipe    K(j + 1) is copied during Q K(j)^T and the softmax, V(j + 1) during P V(j); each copy
//           is a cp.async group of its own, so that a wait is for the oldest but one
//   numbers float32 sums; P is rounded to V's type (float32: products of TF32 pairs, products.h);
//           exp2 within 2 ulp; a row's sum is kept by four lanes and joined at the end
//
// Dao: FlashAttention-2 (2023). Milakov and Gimelshein: Online normalizer calculation for softmax
// (2018). Dao, Haziza, Massa, Sizov: Flash-Decoding (2023).
#pragma once

#include "attention/gpu.h"
#include "attention/sm80/plan.h"
#include "attention/sm80/products.h"
#include "attention/sm80/results.h"
#include "attention/sm80/scores.h"
#include "ptx/launch.h"

namespace flashkern::attention::sm80 {

template <class T, int kDim, int kWarps>
struct Storage {
  static constexpr int kKeys = tile_keys(kDim * sizeof(T));

  Tile<T, 16 * kWarps, kDim> queries;
  Tile<T, kKeys, kDim> keys[2];
  Tile<T, kKeys, kDim> values[2];
};

// Which rows and keys a block has. Empty: nothing is its own.
struct Work {
  int batch, kv_head, split;
  int row_begin, row_end;
  int key_begin, key_end;
  bool whole_output;  // not a part
};

// Within a head the last rows come first: under a causal mask they have the most keys.
FK_DEVICE bool find_work(const ForwardParams& p, const ForwardPlan& plan, Sequence& s, Work& w) {
  const int tile_rows = 16 * plan.warps;
  const int64_t head = blockIdx.x / plan.blocks_per_head;
  const int item = blockIdx.x % plan.blocks_per_head;
  w.batch = static_cast<int>(head / p.kv_heads);
  w.kv_head = static_cast<int>(head % p.kv_heads);
  s = sequence_of(p, w.batch);
  const SequenceCut cut(p.group() * s.q_length, s.k_length, tile_rows, plan.split_keys);
  if (item >= cut.blocks()) return false;
  w.split = item / cut.tiles;
  w.row_begin = (cut.tiles - 1 - item % cut.tiles) * tile_rows;
  w.row_end = min(w.row_begin + tile_rows, cut.rows);
  w.whole_output = cut.splits == 1;
  const int group = static_cast<int>(p.group());
  const Interval keys = Band(p, s).some_keys(w.row_begin / group, (w.row_end - 1) / group + 1);
  w.key_begin = static_cast<int>(keys.begin);
  w.key_end = static_cast<int>(keys.end);
  if (!w.whole_output) {
    w.key_begin = max(w.key_begin, w.split * plan.split_keys);
    w.key_end = min(w.key_end, (w.split + 1) * plan.split_keys);
  }
  return true;
}

template <class T, int kDim, int kWarps>
class Block {
 public:
  using Shared = Storage<T, kDim, kWarps>;
  static constexpr int kKeys = Shared::kKeys;
  using Multiply = Products<T, kDim, kKeys>;

  FK_DEVICE Block(const ForwardParams& p, const Sequence& s, const Work& w, bool aligned)
      : p_(p),
        s_(s),
        w_(w),
        shared_(ptx::shared_storage<Shared>()),
        keys_(p, p.key, s, w.kv_head),
        values_(p, p.value, s, w.kv_head),
        first_row_(static_cast<int>(ptx::warp_id()) * 16),
        aligned_(aligned) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = w.row_begin + first_row_ + static_cast<int>(ptx::lane_id()) / 4 + 8 * r;
      rows_[r] = make_row(p, s, w.kv_head, min(row, w.row_end - 1));
    }
  }

  FK_DEVICE void run() {
    const int begin = w_.key_begin / kKeys * kKeys, end = w_.key_end;
    if (begin < end) {
      const QueryRows<T> queries(p_, p_.query, s_, w_.kv_head);
      copy_tile(shared_.queries, queries, w_.row_begin, w_.row_end, dim(), aligned_);
      copy_keys(begin, 0);
      copy_values(begin, 0);
    }
    int stage = 0;
    for (int first = begin; first < end; first += kKeys, stage ^= 1) step(first, end, stage);
    ptx::copy_wait_all();
  }

  FK_DEVICE void write(const ForwardPlan& plan) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      Row& row = rows_[r];
      row.state.sum = row_sum(row.state.sum);
      const int index = w_.row_begin + first_row_ + static_cast<int>(ptx::lane_id()) / 4 + 8 * r;
      if (index >= w_.row_end) continue;
      if (w_.whole_output) {
        write_output<T, kDim>(p_, s_, row, out_, r);
      } else {
        write_part<kDim>(p_, part_of(p_, plan, w_.batch, w_.kv_head, w_.split, index), row, out_,
                         r);
      }
    }
  }

 private:
  FK_DEVICE int dim() const { return static_cast<int>(p_.head_dim); }
  FK_DEVICE int value_dim() const { return static_cast<int>(p_.value_dim); }

  FK_DEVICE void copy_keys(int first, int stage) {
    copy_tile(shared_.keys[stage], keys_, first, w_.key_end, dim(), aligned_);
    ptx::copy_commit();
  }
  FK_DEVICE void copy_values(int first, int stage) {
    copy_tile(shared_.values[stage], values_, first, w_.key_end, value_dim(), aligned_);
    ptx::copy_commit();
  }

  FK_DEVICE void step(int first, int end, int stage) {
    float scores[kKeys / 8][4] = {};
    ptx::copy_wait<1>();
    __syncthreads();  // K(j) is here; nobody reads K(j - 1) any more
    copy_keys(first + kKeys, stage ^ 1);
    Multiply::scores(scores, shared_.queries, first_row_, shared_.keys[stage], dim());

    const bool whole = first >= rows_[0].first_key && first >= rows_[1].first_key &&
                       first + kKeys <= rows_[0].end_key && first + kKeys <= rows_[1].end_key &&
                       first >= w_.key_begin && first + kKeys <= end;
    modify<T>(scores, rows_, first, p_, static_cast<int>(s_.offset), whole);
    float factor[2];
    online_softmax(scores, rows_, factor);
    rescale(factor);
    if (p_.dropout_p > 0) drop(scores, rows_, first, p_, w_.batch);

    ptx::copy_wait<1>();
    __syncthreads();  // V(j) is here; nobody reads V(j - 1) any more
    copy_values(first + kKeys, stage ^ 1);
    Multiply::output(out_, scores, shared_.values[stage], value_dim());
  }

  FK_DEVICE void rescale(const float (&factor)[2]) {
    if (factor[0] == 1.0f && factor[1] == 1.0f) return;
#pragma unroll
    for (auto& strip : out_) {
#pragma unroll
      for (auto& four : strip) {
#pragma unroll
        for (int i = 0; i < 4; ++i) four[i] *= factor[i / 2];
      }
    }
  }

  const ForwardParams& p_;
  const Sequence& s_;
  const Work& w_;
  Shared& shared_;
  KeyRows<T> keys_, values_;
  int first_row_;
  bool aligned_;
  Row rows_[2];
  Out<kDim> out_ = {};
};

// One block at least: left to itself, ptxas spills to fit more of them.
template <class T, int kDim, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 1)
    forward(const __grid_constant__ ForwardParams p, const __grid_constant__ ForwardPlan plan,
            const bool aligned) {
  Sequence s;
  Work w;
  if (!find_work(p, plan, s, w)) return;
  Block<T, kDim, kWarps> block(p, s, w, aligned);
  block.run();
  block.write(plan);
}

template <class T, int kDim>
void launch_forward(const ForwardParams& p, const ForwardPlan& plan, GpuStream stream) {
  constexpr int kMost = most_warps(kDim * sizeof(T));
  const bool aligned = rows_aligned(p.query, sizeof(T)) && rows_aligned(p.key, sizeof(T)) &&
                       rows_aligned(p.value, sizeof(T));
  const ptx::LaunchShape shape{static_cast<unsigned>(plan.blocks),
                               static_cast<unsigned>(32 * plan.warps),
                               static_cast<size_t>(plan.shared_bytes)};
  ptx::launch(plan.warps == 1 ? forward<T, kDim, 1> : forward<T, kDim, kMost>, shape, stream, p,
              plan, aligned);
  if (plan.splits == 1) return;
  const int64_t rows = p.batch * p.kv_heads * plan.split_rows;
  ptx::launch(merge<T>, {static_cast<unsigned>((rows + 3) / 4), 128}, stream, p, plan);
}

// One source for each dtype, forward_*.cu.
template <class T>
void forward_of(const ForwardParams& p, const ForwardPlan& plan, GpuStream stream) {
  switch (plan.dim) {
    case 32:
      return launch_forward<T, 32>(p, plan, stream);
    case 64:
      return launch_forward<T, 64>(p, plan, stream);
    case 128:
      return launch_forward<T, 128>(p, plan, stream);
    default:
      return launch_forward<T, 256>(p, plan, stream);
  }
}

}  // namespace flashkern::attention::sm80
