// The backward pass of attention with mma.sync, for sm_80 and newer: dQ, dK and dV in one kernel.
//
//   P^T = 2^(scale log2e K Q^T - log2e lse)     dP^T = V dO^T     dS^T = P^T * (dP^T - delta)
//   dV += P^T dO     dK += scale dS^T Q     dQ += scale dS K     dbias = dS       five products
//
//   block   a tile of keys of one KV head. It meets tiles of packed query rows, those alone that
//           the mask lets it see; they are of all heads of the group, so dK and dV, which stay in
//           registers, need no sum across blocks
//   dQ      is summed in float32 in the workspace, in one order: blocks take turns at each tile
//           (backward_turns.h). No atomics on sums; the same bits every time
//   tile    keys x rows, warps; a warp's part of S^T and dP^T | of dK and dV | of dQ (bf16, fp16)
//             to 64   128 x 64, 4   32 x 32, twice | 32 keys, all columns | 32 x 32     81 KiB
//             to 128   64 x 64, 4   32 x 32        | 32 x 64              | 32 x 64     81 KiB
//             to 256   32 x 32, 4   16 x 16        | 32 x 64              | 32 x 64     68 KiB
//           float32: backward_plan.h. Q and dO have two stages up to 64 columns, else one
//   step    barrier | S, dP, dS (to 64: dV, dK from the same registers) | barrier | dV, dK from
//           shared memory, barrier, copies of the next tile | dQ. One thread waits for the turn
//           just before the last barrier in front of dQ, which alone needs it; a step's sums are
//           published behind the next step's first barrier
//   SASS    of a step of a warp, bf16 on sm_80: HMMA 320, LDSM 128, all 1327 (64);
//           HMMA 320, LDSM 136, all 1172 (128); without a mask and with the sums of others
//   numbers float32 sums; P and dS are rounded to the tensors' type before they multiply. Softcap,
//           ALiBi, bias and dropout are a form of their own, with twice the warps
//
// Dao: FlashAttention-2 (2023), section 3.1.2.
#pragma once

#include "attention/gpu.h"
#include "attention/sm80/backward_plan.h"
#include "attention/sm80/backward_products.h"
#include "attention/sm80/backward_shape.h"
#include "attention/sm80/backward_turns.h"
#include "attention/sm80/gradient.h"
#include "attention/sm80/results.h"
#include "ptx/launch.h"

namespace flashkern::attention::sm80 {

// One tile of keys of one KV head. kFull: with softcap, ALiBi, a bias or dropout.
template <class T, int kDim, bool kFull>
class BackwardBlock {
 public:
  using Shape = BackwardShape<T, kDim, kFull>;
  using Shared = BackwardStorage<T, kDim, kFull>;
  static constexpr int kKeys = Shape::kKeys, kRows = Shape::kRows, kStages = Shape::kStages;
  static constexpr int kThreads = 32 * Shape::kWarps;
  static constexpr int kPass = pass_rows<Tile<T, kRows, kDim>>(kThreads);

  FK_DEVICE BackwardBlock(const BackwardParams& p, const BackwardPlan& plan, const Sequence& s,
                          int kv_head, int begin, bool aligned)
      : p_(p),
        plan_(plan),
        s_(s),
        shared_(ptx::shared_storage<Shared>()),
        band_(p, s),
        queries_(QueryRows<T>(p, p.query, s, kv_head).data),
        grads_(QueryRows<T>(p, p.grad_output, s, kv_head).data),
        group_(static_cast<int>(p.group())),
        kv_head_(kv_head),
        rows_(static_cast<int>(p.group() * s.q_length)),
        begin_(begin),
        warp_(static_cast<int>(ptx::warp_id() % Shape::kWarps)),
        aligned_(aligned),
        pass_queries_(aligned && kPass % group_.heads == 0 ? kPass / group_.heads : 0),
        first_tile_(static_cast<int>(kv_head * plan.head_tiles + plan.first_tile(p, s))),
        numbers_(plan.numbers(p, s, kv_head)) {}

  FK_DEVICE void run() {
    const Interval rows = Band(p_, s_).rows(begin_, begin_ + kKeys);
    if (rows.empty()) return;
    const int first = static_cast<int>(rows.begin) * group_.heads / kRows;
    const int end = (static_cast<int>(rows.end) * group_.heads + kRows - 1) / kRows;
    const int keys = static_cast<int>(s_.k_length);
    copy_tile(shared_.keys, KeyRows<T>(p_, p_.key, s_, kv_head_), begin_, keys, dim(), aligned_);
    copy_tile(shared_.values, KeyRows<T>(p_, p_.value, s_, kv_head_), begin_, keys, value_dim(),
              aligned_);
    const int query = first * kRows / group_.heads;
    Place start{query, first * kRows - query * group_.heads};
    copy_rows(first, start, 0);
    int stage = 0;
    Turn turn{p_.turns + 1};  // whose sums are stored, but which is not passed on
    for (int index = first; index < end; ++index) {
      const Rows tile(band_, group_, start, rows_ - index * kRows, begin_);
      start = start.after(kRows, group_);
      turn = step(tile, index, index + 1 < end, start, stage, turn);
      if (kStages == 2) stage ^= 1;
    }
    __syncthreads();
    if (threadIdx.x == 0) turn.pass();
  }

  FK_DEVICE void write() const {
    const Sequence s = sequence_of(p_, s_.batch);  // again: its registers are the loop's till here
    const Output &of_key = p_.grad_key, &of_value = p_.grad_value;
    const int64_t key_at = s_.batch * of_key.batch + kv_head_ * of_key.head;
    const int64_t value_at = s_.batch * of_value.batch + kv_head_ * of_value.head;
#pragma unroll
    for (int r = 0; r < Shape::kOfKeys; r += 8) {
      const int key = begin_ + key_group() + r + lane() / 4;
      if (key >= s.k_length) continue;
      T* keys = static_cast<T*>(of_key.data) + key_at + (s.k_start + key) * of_key.row;
      T* values = static_cast<T*>(of_value.data) + value_at + (s.k_start + key) * of_value.row;
      store_row(keys, key_sums_, r, key_columns(), dim(), plan_.rule.product);
      store_row(values, value_sums_, r, key_columns(), value_dim(), 1.0f);
    }
  }

 private:
  static constexpr int kScoreM = Shape::kScoreKeys / 16, kScoreN = Shape::kScoreRows / 8;
  static constexpr int kSumM = Shape::kOfKeys / 16, kSumN = Shape::kKeyColumns / 8;
  static constexpr int kQueryM = Shape::kOfRows / 16;
  // dQ takes more than one pass where registers are dear.
  static constexpr int kMostColumns = kFull || kDim > 128 ? 32 : 64;
  static constexpr int kQueryN =
      (Shape::kRowColumns < kMostColumns ? Shape::kRowColumns : kMostColumns) / 8;
  // A barrier behind dK and dV lets the next tile come; else the one before them does for dQ too.
  static constexpr bool kTileDone = kStages == 1 && !Shape::kHeld;
  using Rows = QueryTile<kKeys, kRows>;
  using Scores = float[kScoreM][kScoreN][4];

  FK_DEVICE static int lane() { return lane_of_warp(); }
  FK_DEVICE int dim() const { return static_cast<int>(p_.head_dim); }
  FK_DEVICE int value_dim() const { return static_cast<int>(p_.value_dim); }

  // Where the warp's part of each product starts: in the block's keys, rows and columns.
  FK_DEVICE int score_keys() const { return warp_ % Shape::kKeyParts * Shape::kScoreKeys; }
  FK_DEVICE int score_rows() const { return warp_ / Shape::kKeyParts * Shape::kScoreRows; }
  FK_DEVICE int key_group() const { return warp_ % (kKeys / Shape::kOfKeys) * Shape::kOfKeys; }
  FK_DEVICE int key_columns() const {
    return warp_ / (kKeys / Shape::kOfKeys) * Shape::kKeyColumns;
  }
  FK_DEVICE int row_group() const { return warp_ % (kRows / Shape::kOfRows) * Shape::kOfRows; }
  FK_DEVICE int row_columns() const {
    return warp_ / (kRows / Shape::kOfRows) * Shape::kRowColumns;
  }

  // Queries, dO and the numbers of a tile; nothing past the last row.
  FK_DEVICE void copy_rows(int index, Place start, int stage) {
    const int rows = rows_ - index * kRows, thread = static_cast<int>(threadIdx.x);
    copy_packed<kThreads>(shared_.queries[stage], queries_, p_.query, dim(), rows, start, group_,
                          pass_queries_, aligned_);
    copy_packed<kThreads>(shared_.grads[stage], grads_, p_.grad_output, value_dim(), rows, start,
                          group_, pass_queries_, aligned_);
    if (thread < kRows) {
      ptx::copy_async<8>(&shared_.rows[stage][thread],
                         numbers_ + (thread < rows ? index * kRows + thread : 0),
                         thread < rows ? 8 : 0);
    }
    ptx::copy_commit();
  }

  // Tile `index`; the next one, if there is one, starts at `next`.
  FK_DEVICE Turn step(const Rows& tile, int index, bool more, Place next, int stage, Turn last) {
    const Turn turn{p_.turns + 1, first_tile_ + index, tile.last_block - begin_ / kKeys,
                    tile.blocks};
    ptx::copy_wait<0>();
    const bool blind = threadIdx.x < kRows && shared_.rows[stage][threadIdx.x].lse == INFINITY;
    const bool whole = __syncthreads_and(!blind) && tile.whole;  // this tile is here, sums stored
    if (kStages == 2 && more) copy_rows(index + 1, next, stage ^ 1);
    if (threadIdx.x == 0) last.pass();
#pragma unroll 1
    for (int part = 0; part < kRows; part += Shape::kRowParts * Shape::kScoreRows) {
      differentiate(tile, stage, part + score_rows(), whole);
    }
    if (!kTileDone && threadIdx.x == 32) turn.wait();
    __syncthreads();  // P and dS are here, and so is the turn, but for kTileDone
    if constexpr (!Shape::kHeld) {
      multiply<Stored::kByRows, Stored::kByK, kRows>(value_sums_, shared_.weights, key_group(),
                                                     shared_.grads[stage], key_columns());
      multiply<Stored::kByRows, Stored::kByK, kRows>(key_sums_, shared_.logits, key_group(),
                                                     shared_.queries[stage], key_columns());
    }
    if constexpr (kTileDone) {
      if (threadIdx.x == 32) turn.wait();
      __syncthreads();  // nobody reads the tile any more, and the turn is here
    }
#pragma unroll 1
    for (int column = 0; column < Shape::kRowColumns; column += 8 * kQueryN) {
      float d[kQueryM][kQueryN][4] = {};
      const int64_t part = int64_t{first_tile_ + index} * (kRows * kDim) +
                           warp_ * (Shape::kOfRows * Shape::kRowColumns) + Shape::kOfRows * column;
      float* sums = p_.workspace + plan_.sums + part;
      if (!turn.first()) load_sums(d, sums);
      if (kStages == 1 && column == 0 && more) copy_rows(index + 1, next, 0);
      multiply<Stored::kByK, Stored::kByK, kKeys>(d, shared_.logits, row_group(), shared_.keys,
                                                  row_columns() + column);
      turn.last() ? write_query(d, tile, row_columns() + column) : store_sums(d, sums);
    }
    return turn;
  }

  // S^T and dP^T of some rows, and from them P^T and dS^T.
  FK_DEVICE void differentiate(const Rows& tile, int stage, int row, bool whole) {
    Scores x = {}, y = {};
    const int key = score_keys();
    multiply<Stored::kByRows, Stored::kByRows, kDim>(x, shared_.keys, key, shared_.queries[stage],
                                                     row, dim());
    multiply<Stored::kByRows, Stored::kByRows, kDim>(y, shared_.values, key, shared_.grads[stage],
                                                     row, value_dim());
    if constexpr (kFull) {
      apply_full(x, y, tile, stage, row);
    } else if (whole) {
      apply<true>(x, y, tile, stage, row);
    } else {
      apply<false>(x, y, tile, stage, row);
    }
    store_scores(shared_.logits, y, row);
    if constexpr (Shape::kHeld) {
      multiply_held(value_sums_, x, shared_.grads[stage], row);
      multiply_held(key_sums_, y, shared_.queries[stage], row);
    } else {
      store_scores(shared_.weights, x, row);
    }
  }

  // Row i of the tile sees keys [first, end).
  FK_DEVICE void seen(const Rows& tile, int i, int query, float lse, int& first, int& end) const {
    first = band_.first(query);
    end = i < tile.rows && lse != INFINITY ? band_.end(query) : 0;
  }

  template <bool kWhole>
  FK_DEVICE void apply(Scores& x, Scores& y, const Rows& tile, int stage, int row) const {
    const int first_key = begin_ + score_keys() + lane() / 4;
#pragma unroll
    for (int c = 0; c < 2 * kScoreN; ++c) {
      const int i = row + c / 2 * 8 + lane() % 4 * 2 + c % 2;
      const RowNumbers numbers = shared_.rows[stage][i];
      int first = 0, end = 0;
      if (!kWhole) seen(tile, i, tile.start.after(i, group_).query, numbers.lse, first, end);
#pragma unroll
      for (int k = 0; k < 2 * kScoreM; ++k) {
        float &score = x[k / 2][c / 2][k % 2 * 2 + c % 2],
              &grad = y[k / 2][c / 2][k % 2 * 2 + c % 2];
        plan_.rule.plain(numbers, score, grad);
        const int key = first_key + 8 * k;
        if (!kWhole && (key < first || key >= end)) score = grad = 0;
      }
    }
  }

  FK_DEVICE void apply_full(Scores& x, Scores& y, const Rows& tile, int stage, int row) const {
    const int first_key = begin_ + score_keys() + lane() / 4;
    const uint32_t kept = keep_mask(tile, row);
#pragma unroll
    for (int c = 0; c < 2 * kScoreN; ++c) {
      const int i = row + c / 2 * 8 + lane() % 4 * 2 + c % 2;
      const RowNumbers numbers = shared_.rows[stage][i];
      const auto [query, head] = tile.start.after(i, group_);
      int first, end;
      seen(tile, i, query, numbers.lse, first, end);
      const FullRow full = make_full_row(p_, s_, query, kv_head_ * group_.heads + head);
#pragma unroll
      for (int k = 0; k < 2 * kScoreM; ++k) {
        float &score = x[k / 2][c / 2][k % 2 * 2 + c % 2],
              &grad = y[k / 2][c / 2][k % 2 * 2 + c % 2];
        const int key = first_key + 8 * k;
        if (key < first || key >= end) {
          score = grad = 0;
          continue;
        }
        const bool keep = kept >> (2 * kScoreM * c + k) & 1;
        const float of_bias =
            plan_.rule.template full<T>(p_, numbers, full, key, keep, score, grad);
        if (p_.grad_bias.data != nullptr) *bias_gradient(full, key) = of_bias;
      }
    }
  }

  // A bit for each score that is kept, in apply_full's order. Four lanes have the keys of a
  // counter: of four scores each draws for one. A loop that stays rolled up: see dropped in
  // scores.h.
  FK_DEVICE uint32_t keep_mask(const Rows& tile, int row) const {
    static_assert(4 * kScoreM * kScoreN <= 32);
    if (!plan_.rule.drops) return ~0u;
    const uint32_t quad = static_cast<uint32_t>((begin_ + score_keys()) / 4 + lane() / 16);
    uint32_t mask = 0;
#pragma unroll 1
    for (int first = 0; first < 4 * kScoreM * kScoreN; first += 4) {
      const int n = first + lane() / 4 % 4, c = n / (2 * kScoreM), k = n % (2 * kScoreM);
      const int i = row + c / 2 * 8 + lane() % 4 * 2 + c % 2;
      const auto [query, head] = tile.start.after(i, group_);
      const Philox4 own = philox(*p_.seed, quad + 2 * k, query, kv_head_ * group_.heads + head,
                                 static_cast<uint32_t>(s_.batch));
      mask |= kept_of_four(own, plan_.rule.below, lane()) << first;
    }
    return mask;
  }

  // Every element of a whole (batch, heads, rows, keys) is one lane's own; it starts as zeros.
  FK_DEVICE float* bias_gradient(const FullRow& row, int key) const {
    const BiasGradient& g = p_.grad_bias;
    return static_cast<float*>(g.data) + s_.batch * g.batch + row.head * g.head +
           row.query * g.row + key * g.column;
  }

  FK_DEVICE void store_scores(Tile<T, kKeys, kRows>& to, const Scores& x, int row) const {
    using Scored = Tile<T, kKeys, kRows>;
    constexpr int kWide = Scored::kChunkElements;
    const int pair = lane() % 4 * 2;
    const int at = block_at<Scored>(lane() / 4, pair / kWide, score_keys(), row) + pair % kWide;
#pragma unroll
    for (int n = 0; n < 2 * kScoreM * kScoreN; ++n) {
      const int m = n / kScoreN / 2, h = n / kScoreN % 2, j = n % kScoreN;
      store_pair(to.data + (at ^ 8 * j) + (16 * m + 8 * h) * kRows, x[m][j][2 * h],
                 x[m][j][2 * h + 1]);
    }
  }

  FK_DEVICE void write_query(const float (&d)[kQueryM][kQueryN][4], const Rows& tile,
                             int column) const {
    const Output& g = p_.grad_query;
    T* data = static_cast<T*>(g.data) + s_.batch * g.batch + kv_head_ * group_.heads * g.head +
              s_.q_start * g.row;
#pragma unroll
    for (int r = 0; r < Shape::kOfRows; r += 8) {
      const int i = row_group() + r + lane() / 4;
      if (i >= tile.rows) continue;
      store_row(data + tile.start.after(i, group_).at(g), d, r, column, dim(), plan_.rule.product);
    }
  }

  // Row r + lane / 4 of a warp's sums, times a factor, to columns from `column` on.
  template <int M, int N>
  FK_DEVICE static void store_row(T* to, const float (&d)[M][N][4], int r, int column, int dim,
                                  float factor) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int at = column + 8 * j + lane() % 4 * 2;
      const float* pair = d[r / 16][j] + r / 8 % 2 * 2;
      if (at < dim) store_pair(to + at, pair[0] * factor, pair[1] * factor);
    }
  }

  const BackwardParams& p_;
  const BackwardPlan& plan_;
  const Sequence& s_;
  Shared& shared_;
  KeyBand band_;
  const T *queries_, *grads_;
  Group group_;
  int kv_head_, rows_, begin_, warp_;
  bool aligned_;
  int pass_queries_;
  int first_tile_;
  const RowNumbers* numbers_;
  float key_sums_[kSumM][kSumN][4] = {}, value_sums_[kSumM][kSumN][4] = {};
};

template <class T, int kDim, bool kFull>
__global__ void __launch_bounds__(32 * BackwardShape<T, kDim, kFull>::kWarps, 1)
    backward(const __grid_constant__ BackwardParams p, const __grid_constant__ BackwardPlan plan,
             const bool aligned) {
  using Block = BackwardBlock<T, kDim, kFull>;
  auto& shared = ptx::shared_storage<typename Block::Shared>();
  if (threadIdx.x == 0) shared.ticket = atomicAdd(p.turns, 1);
  __syncthreads();
  const int ticket = shared.ticket, head = ticket / plan.blocks_per_head;
  const int begin = (plan.blocks_per_head - 1 - ticket % plan.blocks_per_head) * Block::kKeys;
  const Sequence s = sequence_of(p, head / p.kv_heads);
  if (begin >= s.k_length) return;
  Block block(p, plan, s, static_cast<int>(head % p.kv_heads), begin, aligned);
  block.run();
  block.write();
}

template <class T, int kDim, bool kFull>
void launch_gradients(const BackwardParams& p, const BackwardPlan& plan, GpuStream stream) {
  static_assert(sizeof(BackwardStorage<T, kDim, kFull>) <= 99 * 1024);
  const int64_t blocks = p.batch * p.kv_heads * plan.blocks_per_head;
  if (blocks == 0) return;
  bool aligned = true;
  for (const Matrix* m : {&p.query, &p.key, &p.value, &p.grad_output}) {
    aligned = aligned && rows_aligned(*m, sizeof(T));
  }
  constexpr unsigned kThreads = 32 * BackwardShape<T, kDim, kFull>::kWarps;
  ptx::launch(backward<T, kDim, kFull>,
              {static_cast<unsigned>(blocks), kThreads, sizeof(BackwardStorage<T, kDim, kFull>)},
              stream, p, plan, aligned);
}

// One source for each dtype, backward_*.cu.
template <class T, int kDim>
void launch_bucket(const BackwardParams& p, const BackwardPlan& plan, GpuStream stream) {
  const bool plain = p.softcap == 0 && p.dropout_p == 0 && p.bias.kind == BiasKind::kNone &&
                     p.alibi_slopes == nullptr;
  plain ? launch_gradients<T, kDim, false>(p, plan, stream)
        : launch_gradients<T, kDim, true>(p, plan, stream);
}

template <class T>
void gradients_of(const BackwardParams& p, const BackwardPlan& plan, GpuStream stream) {
  if (plan.dim == 32) return launch_bucket<T, 32>(p, plan, stream);
  if (plan.dim == 64) return launch_bucket<T, 64>(p, plan, stream);
  if (plan.dim == 128) return launch_bucket<T, 128>(p, plan, stream);
  launch_bucket<T, 256>(p, plan, stream);
}

}  // namespace flashkern::attention::sm80
