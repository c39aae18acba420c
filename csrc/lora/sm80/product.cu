// y = x W^T + bias + h B^T and dx = dy W + keep(dh A), bfloat16 or float16, in one sum.
//
// Tile and warps: 128 x 128 of y, four warps of 64 x 64 (2 x 2), mma m16n8k16; a step is 32 deep.
//
//            W: 128 columns                 stage   x 128 x 32, W 128 x 32 (dy W: 32 x 128)
//           +-------+-------+               rows of 64 bytes turn in pairs, of 256 one by one:
//   x: 128  | w0    | w1    |               ldmatrix meets no bank twice
//   rows    +-------+-------+
//           | w2    | w3    |               grid    bands of 8 row tiles, down and then across:
//           +-------+-------+                       a wave shares its x and W in L2
//
// Shared memory: 3 stages x 16 KiB = 48 KiB, so that two blocks find room on any multiprocessor;
// the last stage holds the adapter's tiles first, and the first 34 KiB hold the finished tile at
// the end. Pipeline: copy steps 0, 1 | sum of the adapter, from the last stage | for each step:
// wait, one barrier, copy step s + 2, multiply s.
//
// The adapter comes first: its sum may be masked by dropout (dx) before the base product joins it.
// h and B are rounded to bfloat16 for bfloat16 results. float16 results take them as two bfloat16
// pieces each (three products), so that no h is too large or too small. Several adapters: rows are
// sorted, and each adapter that a tile meets adds its product with other rows' h as zeros.
//
// Numerics: float32 sums, the bias added to them, one rounding.
//
// expand_kernel is the same without a base product, which BLAS then adds: 34 KiB, registers for
// three blocks (two for float16, whose pieces need more).
//
// Hu et al.: LoRA (arXiv 2106.09685); Zhu et al.: LoRAFusion (arXiv 2510.00206) for the order.
#include "lora/sm80/product_tile.h"
#include "ptx/launch.h"

namespace flashkern::sm80 {
namespace {

using namespace tiles;

// ---- products ----

// 16 deep from k on: T is the tiles' type; kAlong: the right tile's rows are columns of y.
template <class T, bool kAlong>
FK_DEVICE void multiply(const T* left, const T* right, int k, const Place& at, Sums& sums) {
  const int lane = at.lane;
  uint32_t b[kStrips][2];
#pragma unroll
  for (int j = 0; j < kStrips; j += 2) {
    const int column = at.warp_column + 8 * j;
    uint32_t four[4];
    if constexpr (kAlong) {
      const int row = column + lane / 16 * 8 + lane % 8, chunk = k / 8 + lane / 8 % 2;
      ptx::ldmatrix(four, right + tile_offset<T, kDepth>(row, chunk));
    } else {
      const int row = k + lane / 8 % 2 * 8 + lane % 8, chunk = column / 8 + lane / 16;
      ptx::ldmatrix_trans(four, right + tile_offset<T, kTile>(row, chunk));
    }
    b[j][0] = four[0], b[j][1] = four[1];
    b[j + 1][0] = four[2], b[j + 1][1] = four[3];
  }
  left += tile_offset<T, kDepth>(at.warp_row + lane % 16, k / 8 + lane / 16);
#pragma unroll
  for (int i = 0; i < kSlabs; ++i) {
    uint32_t a[4];
    ptx::ldmatrix(a, left + 16 * i * kDepth);  // 16 rows on, chunks turn alike
    ptx::mma_strip<T>(sums[i], a, b);
  }
}

// ---- the adapter's product ----

// A pair as bfloat16, or what that rounding left.
FK_DEVICE uint32_t round_pair(float2 v, bool remainder) {
  const uint32_t lead = ptx::pack<BFloat16>(v.x, v.y);
  if (!remainder) return lead;
  const float2 rounded = ptx::unpack<BFloat16>(lead);
  return ptx::pack<BFloat16>(rest(v.x, rounded.x), rest(v.y, rounded.y));
}

FK_DEVICE void put_pair(BFloat16* tile, int row, int k, uint32_t pair) {
  *reinterpret_cast<uint32_t*>(tile + tile_offset<BFloat16, kDepth>(row, k / 8) + k % 8) = pair;
}

// Pairs of ranks that a tile's products read, from `rank` on: 16 or, for up to 16 ranks, 8.
FK_DEVICE int pairs_from(const ProductParams& call, int rank) {
  return call.rank - rank > 16 ? kDepth / 2 : kDepth / 4;
}

FK_DEVICE void fill_left(BFloat16* tile, const Params& p, const Place& at, int adapter, int rank,
                         bool remainder) {
  const ProductParams& call = p.call;
  const int pairs = pairs_from(call, rank), shift = pairs == 16 ? 4 : 3;
#pragma unroll 4
  for (int i = threadIdx.x; i < kTile * pairs; i += kThreads) {
    const int row = i >> shift, k = 2 * (i & (pairs - 1));
    const int64_t position = at.row + row;
    float2 v = {0.0f, 0.0f};
    if (position < call.rows && call.order.adapter(position) == adapter) {
      const float* low = call.low + call.order.row(position) * call.rank + rank + k;
      if (p.low_paired && rank + k < call.rank) {
        v = *reinterpret_cast<const float2*>(low);
      } else {
        if (rank + k < call.rank) v.x = low[0];
        if (rank + k + 1 < call.rank) v.y = low[1];
      }
    }
    put_pair(tile, row, k, round_pair(v, remainder));
  }
}

template <class T>
FK_DEVICE void fill_right(BFloat16* tile, const Params& p, const Place& at, int adapter, int rank,
                          bool remainder) {
  const ProductParams& call = p.call;
  const bool along = call.factor.k_step == 1;
  const int pairs = pairs_from(call, rank), shift = pairs == 16 ? 4 : 3;
#pragma unroll 4
  for (int i = threadIdx.x; i < kTile * pairs; i += kThreads) {
    const int row = along ? i >> shift : i % kTile;
    const int k = 2 * (along ? i & (pairs - 1) : i / kTile);
    const int64_t column = at.column + row;
    float2 v = {0.0f, 0.0f};
    if (column < call.columns && rank + k < call.rank) {
      const int64_t offset = call.factor.offset(adapter, column, rank + k);
      if (p.factor_paired) {
        v = call.factor.load_pair<T>(offset);
      } else {
        v.x = call.factor.load<T>(offset);
        if (rank + k + 1 < call.rank) v.y = call.factor.load<T>(offset + call.factor.k_step);
      }
    }
    put_pair(tile, row, k, round_pair(v, remainder));
  }
}

template <class T>
FK_DEVICE void add_adapter(Stage<T>& stage, const Params& p, const Place& at, int adapter,
                           Sums& sums) {
  constexpr bool kHalf = std::is_same_v<T, Half>;
  auto* left = reinterpret_cast<BFloat16*>(stage.left);
  auto* right = reinterpret_cast<BFloat16*>(stage.right);
  for (int rank = 0; rank < p.call.rank; rank += kDepth) {
    for (int pass = 0; pass < (kHalf ? 3 : 1); ++pass) {  // remainders against leading pieces
      __syncthreads();
      fill_left(left, p, at, adapter, rank, pass == 2);
      fill_right<T>(right, p, at, adapter, rank, pass == 1);
      __syncthreads();
      for (int k = 0; k < kDepth && rank + k < p.call.rank; k += 16) {
        multiply<BFloat16, true>(left, right, k, at, sums);
      }
    }
  }
}

// Which of a slab's 32 sums dropout drops: bit 4 j + e. Two lanes share four columns, two rows
// each: either draws for one row and hands half over.
FK_DEVICE uint32_t dropped(const ProductParams& call, const Place& at, int slab) {
  const int odd = at.lane % 2;
  const int64_t position = at.row + at.warp_row + 16 * slab + at.lane / 4 + 8 * odd;
  const int64_t row = position < call.rows ? call.order.row(position) : 0;
  const int64_t quad = (at.column + at.warp_column) / 4 + at.lane % 4 / 2;
  uint32_t bits = 0;
#pragma unroll 1  // 32 draws side by side would not fit the registers
  for (int j = 0; j < kStrips; ++j) {
    const Philox4 own = call.keep.words(row, quad + 2 * j);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint32_t other =
          __shfl_xor_sync(ptx::kAllLanes, odd ? own.word[e] : own.word[2 + e], 1);
      bits |= static_cast<uint32_t>((odd ? other : own.word[e]) <= call.keep.below) << (4 * j + e);
      bits |= static_cast<uint32_t>((odd ? own.word[2 + e] : other) <= call.keep.below)
              << (4 * j + 2 + e);
    }
  }
  return bits;
}

FK_DEVICE void drop(const ProductParams& call, const Place& at, Sums& sums) {
#pragma unroll
  for (int i = 0; i < kSlabs; ++i) {
    const uint32_t bits = dropped(call, at, i);
#pragma unroll
    for (int n = 0; n < 4 * kStrips; ++n) {
      if (bits >> n & 1) sums[i][n / 4][n % 4] = 0.0f;
    }
  }
}

template <class T>
FK_DEVICE void add_adapters(Stage<T>& stage, const Params& p, const Place& at, Sums& sums) {
  const RowOrder& order = p.call.order;
  const int64_t last = min(at.row + kTile, p.call.rows) - 1;
  const int from = max(order.adapter(at.row), 0), to = order.adapter(last);
  for (int adapter = from; adapter <= to; ++adapter) {
    if (!order.empty(adapter)) add_adapter<T>(stage, p, at, adapter, sums);
  }
}

// ---- the end ----

// The bias, where a lane's sums lie; then rounded into the finished tile.
template <class T>
FK_DEVICE void finish(T* tile, const Params& p, const Place& at, const Sums& sums) {
  const ProductParams& call = p.call;
  const auto* bias = static_cast<const T*>(call.bias);
#pragma unroll
  for (int j = 0; j < kStrips; ++j) {
    const int within = at.warp_column + 8 * j + at.lane % 4 * 2;
    const int64_t column = at.column + within;
    float added[2] = {};
    for (int c = 0; c < 2 && bias != nullptr && column + c < call.columns; ++c) {
      added[c] = ptx::to_float(bias[column + c]);
    }
#pragma unroll
    for (int i = 0; i < kSlabs; ++i) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int row = at.warp_row + 16 * i + at.lane / 4 + 4 * e;
        *reinterpret_cast<uint32_t*>(tile + row * kPitch + within) =
            ptx::pack<T>(sums[i][j][e] + added[0], sums[i][j][e + 1] + added[1]);
      }
    }
  }
}

template <class T>
FK_DEVICE void write(const T* tile, const Params& p, const Place& at) {
  const ProductParams& call = p.call;
  constexpr int kChunks = kTile / 8;
  for (int i = threadIdx.x; i < kTile * kChunks; i += kThreads) {
    const int row = i / kChunks, within = i % kChunks * 8;
    const int64_t position = at.row + row, column = at.column + within;
    if (position >= call.rows || column >= call.columns) continue;
    const T* from = tile + row * kPitch + within;
    T* to = static_cast<T*>(call.out) + call.order.row(position) * call.columns + column;
    if (p.out_aligned) {  // columns are a multiple of 8 then
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int e = 0; e < 8 && column + e < call.columns; ++e) to[e] = from[e];
    }
  }
}

template <class T, bool kAlong>
__global__ void __launch_bounds__(kThreads, 2) product_kernel(const Params p) {
  auto& shared = ptx::shared_storage<Storage<T, true>>();
  const ProductParams& call = p.call;
  const Place at(call);
  const int steps = static_cast<int>((call.depth + kDepth - 1) / kDepth);
  const int whole = p.left_aligned && p.weight_aligned ? call.depth / kDepth : 0;
  Source<T, true> left(call.left, call.left_row, 8 * Source<T, true>::chunk(),
                       [&](int row) { return left_row(call, at, row); });
  const int64_t chunk = 8 * Source<T, kAlong>::chunk();
  Source<T, kAlong> right(call.weight, kAlong ? call.depth : call.columns,
                          kAlong ? chunk : min(at.column + chunk, call.columns - 8), [&](int row) {
                            return kAlong ? right_row(call, at, row) : int64_t{row};
                          });
  const auto copy = [&](int step) {
    auto& stage = shared.stage[step % kStages];
    if (step < whole) {
      left.copy_next(stage.left);
      right.copy_next(stage.right);
    } else if (step < steps) {
      copy_edge<T, kAlong>(stage, p, at, int64_t{step} * kDepth);
    }
    ptx::copy_commit();
  };
  for (int s = 0; s < kStages - 1; ++s) copy(s);
  Sums sums = {};
  if (call.low != nullptr) {
    add_adapters<T>(shared.stage[kStages - 1], p, at, sums);
    if constexpr (!kAlong) {  // dx's alone: y has h, where dropout has been
      if (!call.keep.all) drop(call, at, sums);
    }
  }
  for (int s = 0; s < steps; ++s) {
    ptx::copy_wait<kStages - 2>();
    __syncthreads();  // step s has landed, everybody has read step s - 1
    copy(s + kStages - 1);
    const auto& stage = shared.stage[s % kStages];
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      multiply<T, kAlong>(stage.left, stage.right, k, at, sums);
    }
  }
  ptx::copy_wait_all();
  __syncthreads();
  finish(shared.finished, p, at, sums);
  __syncthreads();
  write(shared.finished, p, at);
}

// y = h B^T + bias and dx = keep(dh A), to which BLAS adds the base product.
template <class T>
__global__ void __launch_bounds__(kThreads, std::is_same_v<T, Half> ? 2 : 3)
    expand_kernel(const Params p) {
  auto& shared = ptx::shared_storage<Storage<T, false>>();
  const Place at(p.call);
  Sums sums = {};
  if (p.call.low != nullptr) {
    add_adapters<T>(shared.stage[0], p, at, sums);
    if (!p.call.keep.all) drop(p.call, at, sums);
  }
  __syncthreads();
  finish(shared.finished, p, at, sums);
  __syncthreads();
  write(shared.finished, p, at);
}

template <class T>
void run(const ProductParams& call, cudaStream_t stream) {
  const int64_t weight_row = call.transposed ? call.depth : call.columns;
  const Params p{call,
                 aligned(call.left, call.left_row * 2),
                 aligned(call.weight, weight_row * 2),
                 aligned(call.out, call.columns * 2),
                 call.rank % 2 == 0,
                 pairs_lie_together(call.factor, call.rank, call.factor.wide ? 4 : 2)};
  const auto blocks =
      static_cast<unsigned>(divide_up(call.rows, kTile) * divide_up(call.columns, kTile));
  const ptx::LaunchShape shape{blocks, kThreads, sizeof(Storage<T, true>)};
  if (call.depth == 0) {
    ptx::launch(expand_kernel<T>, {blocks, kThreads, sizeof(Storage<T, false>)}, stream, p);
  } else if (call.transposed) {
    ptx::launch(product_kernel<T, true>, shape, stream, p);
  } else {
    ptx::launch(product_kernel<T, false>, shape, stream, p);
  }
}

}  // namespace

void product(const ProductParams& call, cudaStream_t stream) {
  if (call.rows == 0 || call.columns == 0) return;
  call.dtype == DType::kFloat16 ? run<Half>(call, stream) : run<BFloat16>(call, stream);
}

}  // namespace flashkern::sm80
