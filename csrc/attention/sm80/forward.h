// Attention forward with mma.sync, for sm_80 and newer: output = softmax(mask(Q K^T)) V and lse.
//
//   block   query rows of one KV head of one sequence, the heads of its group packed query by
//           query, so that one read of a key serves them all. A warp owns 16 rows, or two strips of
//           16, against every key; warps meet only where tiles change hands. plan.h has the forms:
//           few (16 rows), narrow (64), wide and plain (128)
//   keys    in tiles of 16 KiB, those alone that some row of the block sees; where a sequence has
//           few rows its keys are split among blocks and a second kernel merges. A prompt's keys
//           that beams share have a launch of their own, the rows of all its beams packed; its
//           parts and those of each beam's own keys meet in that merge
//   memory  Q | K | V | what each row sees, its maximum and sum | the block's work: 73 KiB for 128
//           rows of 128 columns, so that two blocks share a multiprocessor of sm_80, as its
//           registers allow; at most 99 KiB in any form. 16-byte chunks are swizzled, tails of rows
//           and columns are zeros
//   pipe    one stage: V(j) is copied during Q K(j)^T, K(j + 1) during the softmax and P V(j). A
//           product of 128 x 64 x 128 takes about as long as memory to answer, the other block
//           fills what is left. few: two stages, K(j + 1) and V(j + 1) come during all of step j
//   regs    128 rows of 128 columns: 128 for sums, 64 for scores, 63 for all else; so the states of
//           rows live in shared memory between tiles
//   numbers float32 sums; P is rounded to V's type (float32: products of TF32 pairs, products.h);
//           exp2 within 2 ulp; a row's sum is kept by four lanes and joined at the end
//
// Dao: FlashAttention-2 (2023). Milakov and Gimelshein: Online normalizer calculation for softmax
// (2018). Dao, Haziza, Massa, Sizov: Flash-Decoding (2023).
#pragma once

#include "attention/gpu.h"
#include "attention/sm80/plan.h"
#include "attention/sm80/results.h"
#include "attention/sm80/scores.h"
#include "attention/sm80/work.h"
#include "ptx/launch.h"

namespace flashkern::attention::sm80 {

template <class T, int kDim, Form kForm>
struct Storage {
  static constexpr int kRowBytes = kDim * sizeof(T), kKeys = tile_keys(kRowBytes);
  static constexpr int kStages = form_stages(kForm), kRows = form_rows(kForm, kRowBytes);

  Tile<T, kRows, kDim> queries;
  Tile<T, kKeys, kDim> keys[kStages];
  Tile<T, kKeys, kDim> values[kStages];
  Row rows[kRows];
  RowState<float> states[kRows * 4];  // of each row, one for each of its four lanes
  Work work;
};

template <class T, int kDim, Form kForm>
class Block {
 public:
  using Shared = Storage<T, kDim, kForm>;
  static constexpr int kKeys = Shared::kKeys, kStages = Shared::kStages;
  static constexpr int kStrips = form_strips(kForm);
  static constexpr int kThreads = 32 * form_warps(kForm, Shared::kRowBytes);
  static constexpr bool kPlain = kForm == Form::kPlain;
  using Multiply = Products<T, kDim, kKeys, kStrips>;
  using KeyTile = Tile<T, kKeys, kDim>;
  using Keys = KeyRows<T, (kForm < Form::kWide)>;  // plan.h: no wide form reads a beam table
  using Copy = TileCopy<kThreads, T, kKeys, kDim>;

  FK_DEVICE Block(const ForwardParams& p, const ForwardPlan& plan, Shared& shared)
      : p_(p),
        plan_(plan),
        shared_(shared),
        keys_(p, p.key, shared.work.sequence, shared.work.kv_head),
        values_(p, p.value, shared.work.sequence, shared.work.kv_head),
        key_copy_(keys_, begin(), static_cast<int>(p.head_dim)),
        value_copy_(values_, begin(), static_cast<int>(p.value_dim)),
        warp_row_(static_cast<int>(threadIdx.x / 32) * 16 * kStrips) {}

  FK_DEVICE void run() {
    const Work& w = shared_.work;
    const int end = w.key_end;
    if (begin() < end) {
      const QueryRows<T> queries(p_, p_.query, w.sequence, w.kv_head);
      copy_tile(shared_.queries, queries, w.row_begin, w.row_end, dim(), plan_.aligned);
      copy_keys(begin(), end, 0);
      if (kStages == 2) copy_values(begin(), end, 0);
    }
    make_rows();
    int stage = 0;
    for (int first = begin(); first < end; first += kKeys) {
      step(first, end, stage);
      stage ^= kStages - 1;
    }
    ptx::copy_wait_all();
  }

  FK_DEVICE void write() {
    const Work& w = shared_.work;
#pragma unroll
    for (int m = 0; m < kStrips; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        RowState<float> whole = state(m, r);
        whole.sum = row_sum(whole.sum);
        const int own = warp_row_ + 16 * m + 8 * r + static_cast<int>(ptx::lane_id()) / 4;
        const int index = w.row_begin + own;
        if (index >= w.row_end) continue;
        if (w.whole_output) {
          write_output<T>(p_, plan_.rule.keep, w.sequence, shared_.rows[own], whole, sums_[m], r);
        } else {
          float* part =
              part_of(p_, plan_, w.sequence, w.kv_head, w.split, shared_.rows[own], index);
          write_part(p_, part, whole, sums_[m], r);
        }
      }
    }
  }

 private:
  FK_DEVICE int begin() const { return shared_.work.key_begin / kKeys * kKeys; }
  FK_DEVICE int dim() const { return static_cast<int>(p_.head_dim); }
  FK_DEVICE int value_dim() const { return static_cast<int>(p_.value_dim); }

  // The lane's own of row r (0: g, 1: g + 8) of a strip.
  FK_DEVICE RowState<float>& state(int m, int r) {
    return shared_.states[(2 * m + r) * kThreads + static_cast<int>(threadIdx.x)];
  }

  // What the rows see. Those past the last do as the last.
  FK_DEVICE void make_rows() {
    const Work& w = shared_.work;
    for (int i = static_cast<int>(threadIdx.x); i < Shared::kRows; i += kThreads) {
      const int row = min(w.row_begin + i, w.row_end - 1);
      const Row made = make_row(p_, w.sequence, w.kv_head, row);
      shared_.rows[i] = made;
    }
    for (int i = 0; i < 2 * kStrips; ++i) state(i / 2, i % 2) = {};
    __syncthreads();
  }

  FK_DEVICE void copy_keys(int first, int end, int stage) {
    copy(shared_.keys[stage], key_copy_, keys_, first, end, dim());
  }
  FK_DEVICE void copy_values(int first, int end, int stage) {
    copy(shared_.values[stage], value_copy_, values_, first, end, value_dim());
  }
  FK_DEVICE void copy(KeyTile& tile, Copy& fast, const Keys& keys, int first, int end,
                      int columns) {
    if (kPlain || (plan_.aligned && keys.contiguous())) {
      fast(tile, first, end);
    } else if (plan_.aligned) {
      copy_scattered<kThreads>(tile, keys, first, end, columns);
    } else {
      copy_tile(tile, keys, first, end, columns, false);
    }
    ptx::copy_commit();
  }

  FK_DEVICE void step(int first, int end, int stage) {
    typename Multiply::Scores scores = {};
    ptx::copy_wait<kStages - 1>();
    __syncthreads();  // K(j) is here; nobody reads V(j - 1) any more, nor K(j - 1)
    if constexpr (kStages == 1) {
      copy_values(first, end, 0);
    } else {
      copy_keys(first + kKeys, end, stage ^ 1);
    }
    Multiply::scores(scores, shared_.queries, warp_row_, shared_.keys[stage], dim());

    if constexpr (kStages == 1) {
      ptx::copy_wait<0>();
      __syncthreads();  // V(j) is here; nobody reads K(j) any more
      copy_keys(first + kKeys, end, 0);
      soften(scores, first);
    } else {
      soften(scores, first);
      ptx::copy_wait<1>();
      __syncthreads();  // V(j) is here; nobody reads V(j - 1) any more
      copy_values(first + kKeys, end, stage ^ 1);
    }
    Multiply::output(sums_, scores, shared_.values[stage], value_dim());
  }

  // From products of queries and keys to probabilities.
  FK_DEVICE void soften(typename Multiply::Scores& scores, int first) {
    const Row* own = &shared_.rows[warp_row_];  // the first sees the least on the right
    const bool whole = first >= own[16 * kStrips - 1].first_key && first + kKeys <= own->end_key;
#pragma unroll
    for (int m = 0; m < kStrips; ++m) {
      const Row* rows = &shared_.rows[warp_row_ + 16 * m + static_cast<int>(ptx::lane_id()) / 4];
      if (!kPlain && !plan_.plain) {
        modify<T>(scores[m], rows, first, p_, plan_.rule,
                  static_cast<int>(shared_.work.sequence.offset));
      }
      if (!whole) mask(scores[m], rows, first);
      float factor[2];
      RowState<float> states[2] = {state(m, 0), state(m, 1)};
      online_softmax(scores[m], states, plan_.scale, factor);
      state(m, 0) = states[0], state(m, 1) = states[1];
      rescale(sums_[m], factor);
      if (!kPlain && plan_.rule.drops) {
        drop(scores[m], rows, first, p_, plan_.rule.below,
             static_cast<int>(shared_.work.sequence.batch));
      }
    }
  }

  // Maxima seldom rise once some tiles are done.
  template <int N>
  FK_DEVICE static void rescale(float (&sums)[N][4], const float (&factor)[2]) {
    if (!__any_sync(ptx::kAllLanes, factor[0] != 1.0f || factor[1] != 1.0f)) return;
#pragma unroll
    for (auto& four : sums) {
#pragma unroll
      for (int i = 0; i < 4; ++i) four[i] *= factor[i / 2];
    }
  }

  const ForwardParams& p_;
  const ForwardPlan& plan_;
  Shared& shared_;
  Keys keys_, values_;
  Copy key_copy_, value_copy_;
  int warp_row_;
  typename Multiply::Sums sums_ = {};
};

template <class T, int kDim, Form kForm>
__global__ void __launch_bounds__(Block<T, kDim, kForm>::kThreads, kForm == Form::kFew ? 1 : 2)
    forward(const __grid_constant__ ForwardParams p, const __grid_constant__ ForwardPlan plan) {
  using Shared = Storage<T, kDim, kForm>;
  static_assert(sizeof(Shared) <= forward_shared_bytes(kForm, Shared::kRowBytes));
  auto& shared = ptx::shared_storage<Shared>();
  if (ptx::warp_id() == 0) {
    const Work work = find_work<Shared::kRows>(p, plan);
    if (ptx::lane_id() == 0) shared.work = work;
  }
  __syncthreads();
  if (shared.work.row_end == 0) return;
  Block<T, kDim, kForm> block(p, plan, shared);
  block.run();
  block.write();
}

template <class T, int kDim, Form kForm>
void launch_form(const ForwardParams& p, const ForwardPlan& plan, GpuStream stream) {
  ptx::launch(forward<T, kDim, kForm>,
              {static_cast<unsigned>(plan.blocks), static_cast<unsigned>(32 * plan.warps),
               static_cast<size_t>(plan.shared_bytes)},
              stream, p, plan);
}

template <class T, int kDim>
void launch_part(const ForwardParams& p, const ForwardPlan& plan, GpuStream stream) {
  if (plan.form == Form::kFew) launch_form<T, kDim, Form::kFew>(p, plan, stream);
  if (plan.form == Form::kNarrow) launch_form<T, kDim, Form::kNarrow>(p, plan, stream);
  if constexpr (has_wide(kDim, sizeof(T))) {
    if (plan.form == Form::kWide) launch_form<T, kDim, Form::kWide>(p, plan, stream);
    if (plan.form == Form::kPlain) launch_form<T, kDim, Form::kPlain>(p, plan, stream);
  }
}

template <class T, int kDim>
void launch_forward(const ForwardParams& p, const ForwardPlan& plan, GpuStream stream) {
  if (plan.joined) {
    const ForwardParams shared = shared_part(p);
    launch_part<T, kDim>(shared, plan_shared(shared, plan), stream);
  }
  launch_part<T, kDim>(p, plan, stream);
  if (plan.splits == 1 && !plan.joined) return;
  const int64_t rows = p.batch * p.kv_heads * plan.split_rows;
  ptx::launch(merge<T>, {static_cast<unsigned>(rows), 32 * kMergeWarps, sizeof(MergeStorage)},
              stream, p, plan);
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
