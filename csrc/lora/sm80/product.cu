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
// Shared memory: 4 stages x 16 KiB = 64 KiB, two blocks on a multiprocessor; the last stage holds
// the adapter's tiles first, and the first 34 KiB hold the finished tile at the end.
// Pipeline: copy steps 0 .. 2 | sum of the adapter, from the last stage | for each step: wait, one
// barrier, copy step s + 3, multiply s.
//
// The adapter comes first: its sum may be masked by dropout (dx) before the base product joins it.
// h and B are rounded to bfloat16 for bfloat16 results. float16 results take them as two bfloat16
// pieces each (three products), so that no h is too large or too small. Several adapters: rows are
// sorted, and each adapter that a tile meets adds its product with other rows' h as zeros.
//
// Numerics: float32 sums, the bias added to them, one rounding. Without a depth the sum is the
// adapter's alone: BLAS adds the base product to it.
//
// Hu et al.: LoRA (arXiv 2106.09685); Zhu et al.: LoRAFusion (arXiv 2510.00206) for the order.
#include "lora/sm80/kernels.h"
#include "ptx/launch.h"

namespace flashkern::sm80 {
namespace {

constexpr int kTile = kProductTile, kDepth = 32, kThreads = 128, kStages = 4, kBand = 8;
constexpr int kStrips = 8, kSlabs = 4;  // a warp's 64 x 64: slabs of 16 rows, strips of 8 columns
constexpr int kPitch = kTile + 8;       // of the finished tile: 16 bytes more turn the banks

using Sums = float[kSlabs][kStrips][4];

template <class T>
struct Storage {
  struct Stage {
    alignas(1024) T left[kTile * kDepth];
    alignas(1024) T right[kTile * kDepth];
  };
  Stage stage[kStages];
};
static_assert(sizeof(Storage<Half>) >= kTile * kPitch * sizeof(Half));

struct Params {
  ProductParams call;
  bool left_aligned, weight_aligned, out_aligned;
};

// This block's tile, and where a lane's sums lie in it.
struct Place {
  int64_t row, column;
  int warp_row, warp_column, lane;

  FK_DEVICE explicit Place(const ProductParams& call) {
    const int64_t down = (call.rows + kTile - 1) / kTile;
    const int64_t across = (call.columns + kTile - 1) / kTile;
    const int64_t band = blockIdx.x / (kBand * across) * kBand;
    const int64_t height = min(int64_t{kBand}, down - band);
    const int64_t within = blockIdx.x - band * across;
    row = (band + within % height) * kTile;
    column = within / height * kTile;
    const int warp = threadIdx.x / 32;
    warp_row = warp / 2 * 64;
    warp_column = warp % 2 * 64;
    lane = threadIdx.x % 32;
  }
};

// ---- copies ----

// A thread's four chunks of a tile: 128 rows of 4 chunks (along the depth), or 32 rows of 16. Rows
// and columns beyond the matrix are its last ones: what is made of them is not written.
template <class T, bool kAlong>
struct Source {
  static constexpr int kWidth = kAlong ? kDepth : kTile, kChunks = kWidth / 8;
  const T* at[kAlong ? 4 : 1];  // of the next step; rows of the depth follow from the first
  int64_t advance;              // from one step to the next

  template <class RowOf>
  FK_DEVICE Source(const void* matrix, int64_t pitch, int64_t column, RowOf&& row_of)
      : advance(kAlong ? kDepth : kDepth * pitch) {
#pragma unroll
    for (int i = 0; i < (kAlong ? 4 : 1); ++i) {
      at[i] = static_cast<const T*>(matrix) + row_of(tile_row(i)) * pitch + column;
    }
  }

  FK_DEVICE static int chunk() { return threadIdx.x % kChunks; }
  FK_DEVICE static int tile_row(int i) { return threadIdx.x / kChunks + i * (kThreads / kChunks); }

  FK_DEVICE void copy_next(T* tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ptx::copy_async<16>(tile + tile_offset<T, kWidth>(tile_row(i), chunk()),
                          kAlong ? at[i] : at[0] + i * (advance / 4));
      if (kAlong || i == 3) at[kAlong ? i : 0] += advance;
    }
  }
};

FK_DEVICE int64_t left_row(const ProductParams& call, const Place& at, int row) {
  return call.order.row(min(at.row + row, call.rows - 1));
}

FK_DEVICE int64_t right_row(const ProductParams& call, const Place& at, int row) {
  return min(at.column + row, call.columns - 1);
}

// A step with the end of the depth in it, or of rows that are not whole chunks: zeros beyond the
// depth.
template <class T, bool kAlong>
FK_DEVICE void copy_edge(typename Storage<T>::Stage& stage, const Params& p, const Place& at,
                         int64_t k) {
  const ProductParams& call = p.call;
  const auto* left = static_cast<const T*>(call.left);
  const auto* weight = static_cast<const T*>(call.weight);
#pragma unroll 1
  for (int i = threadIdx.x; i < kTile * kDepth / 8; i += kThreads) {
    const int row = i / 4, chunk = i % 4;
    const int64_t depth = k + 8 * chunk;
    const int count = clamp_count(call.depth - depth, 8);
    const int64_t from = count > 0 ? left_row(call, at, row) * call.left_row + depth : 0;
    copy_chunk(stage.left + tile_offset<T, kDepth>(row, chunk), left + from, count, p.left_aligned);
    if constexpr (kAlong) {
      const int64_t from = count > 0 ? right_row(call, at, row) * call.depth + depth : 0;
      copy_chunk(stage.right + tile_offset<T, kDepth>(row, chunk), weight + from, count,
                 p.weight_aligned);
    }
  }
#pragma unroll 1
  for (int i = threadIdx.x; !kAlong && i < kTile * kDepth / 8; i += kThreads) {
    const int row = i / 16, chunk = i % 16;
    const int64_t depth = k + row, column = at.column + 8 * chunk;
    const int count = depth < call.depth ? clamp_count(call.columns - column, 8) : 0;
    const int64_t from = count > 0 ? depth * call.columns + column : 0;
    copy_chunk(stage.right + tile_offset<T, kTile>(row, chunk), weight + from, count,
               p.weight_aligned);
  }
}

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

FK_DEVICE void fill_left(BFloat16* tile, const ProductParams& call, const Place& at, int adapter,
                         int rank, bool remainder) {
  constexpr int kPairs = kDepth / 2;
#pragma unroll 4
  for (int i = threadIdx.x; i < kTile * kPairs; i += kThreads) {
    const int row = i / kPairs, k = i % kPairs * 2;
    const int64_t position = at.row + row;
    float2 v = {0.0f, 0.0f};
    if (position < call.rows && call.order.adapter(position) == adapter) {
      const float* low = call.low + call.order.row(position) * call.rank;
      if (rank + k < call.rank) v.x = low[rank + k];
      if (rank + k + 1 < call.rank) v.y = low[rank + k + 1];
    }
    put_pair(tile, row, k, round_pair(v, remainder));
  }
}

template <class T>
FK_DEVICE void fill_right(BFloat16* tile, const ProductParams& call, const Place& at, int adapter,
                          int rank, bool remainder) {
  constexpr int kPairs = kDepth / 2;
  const bool along = call.factor.k_step == 1;
#pragma unroll 4
  for (int i = threadIdx.x; i < kTile * kPairs; i += kThreads) {
    const int row = along ? i / kPairs : i % kTile;
    const int k = (along ? i % kPairs : i / kTile) * 2;
    const int64_t column = at.column + row;
    float2 v = {0.0f, 0.0f};
    if (column < call.columns) {
      if (rank + k < call.rank) v.x = call.factor.at<T>(adapter, column, rank + k);
      if (rank + k + 1 < call.rank) v.y = call.factor.at<T>(adapter, column, rank + k + 1);
    }
    put_pair(tile, row, k, round_pair(v, remainder));
  }
}

template <class T>
FK_DEVICE void add_adapter(typename Storage<T>::Stage& stage, const ProductParams& call,
                           const Place& at, int adapter, Sums& sums) {
  constexpr bool kHalf = std::is_same_v<T, Half>;
  auto* left = reinterpret_cast<BFloat16*>(stage.left);
  auto* right = reinterpret_cast<BFloat16*>(stage.right);
  for (int rank = 0; rank < call.rank; rank += kDepth) {
    for (int pass = 0; pass < (kHalf ? 3 : 1); ++pass) {  // remainders against leading pieces
      __syncthreads();
      fill_left(left, call, at, adapter, rank, pass == 2);
      fill_right<T>(right, call, at, adapter, rank, pass == 1);
      __syncthreads();
      for (int k = 0; k < kDepth && rank + k < call.rank; k += 16) {
        multiply<BFloat16, true>(left, right, k, at, sums);
      }
    }
  }
}

// Two lanes share four columns, two rows each: either draws for one row and hands half over.
FK_DEVICE void drop(const ProductParams& call, const Place& at, Sums& sums) {
  const int odd = at.lane % 2;
#pragma unroll
  for (int i = 0; i < kSlabs; ++i) {
    const int64_t position = at.row + at.warp_row + 16 * i + at.lane / 4 + 8 * odd;
    const int64_t row = position < call.rows ? call.order.row(position) : 0;
#pragma unroll
    for (int j = 0; j < kStrips; ++j) {
      const int64_t quad = (at.column + at.warp_column + 8 * j) / 4 + at.lane % 4 / 2;
      const Philox4 own = call.keep.words(row, quad);
      uint32_t words[4];  // of d[0] .. d[3]
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t other =
            __shfl_xor_sync(ptx::kAllLanes, odd ? own.word[e] : own.word[2 + e], 1);
        words[e] = odd ? other : own.word[e];
        words[2 + e] = odd ? own.word[2 + e] : other;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (words[e] <= call.keep.below) sums[i][j][e] = 0.0f;
      }
    }
  }
}

template <class T>
FK_DEVICE void add_adapters(typename Storage<T>::Stage& stage, const ProductParams& call,
                            const Place& at, Sums& sums) {
  const int64_t last = min(at.row + kTile, call.rows) - 1;
  const int from = max(call.order.adapter(at.row), 0), to = call.order.adapter(last);
  for (int adapter = from; adapter <= to; ++adapter) {
    if (!call.order.empty(adapter)) add_adapter<T>(stage, call, at, adapter, sums);
  }
}

// ---- the end ----

// The bias, where a lane's sums lie; then rounded into the finished tile.
template <class T>
FK_DEVICE void finish(T* tile, const Params& p, const Place& at, const Sums& sums) {
  const ProductParams& call = p.call;
  const auto* bias = static_cast<const T*>(call.bias);
#pragma unroll
  for (int i = 0; i < kSlabs; ++i) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int row = at.warp_row + 16 * i + at.lane / 4 + 4 * e;
#pragma unroll
      for (int j = 0; j < kStrips; ++j) {
        const int within = at.warp_column + 8 * j + at.lane % 4 * 2;
        float v[2] = {sums[i][j][e], sums[i][j][e + 1]};
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int64_t column = at.column + within + c;
          if (column >= call.columns) continue;
          if (bias != nullptr) v[c] += ptx::to_float(bias[column]);
        }
        *reinterpret_cast<uint32_t*>(tile + row * kPitch + within) = ptx::pack<T>(v[0], v[1]);
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
  auto& shared = ptx::shared_storage<Storage<T>>();
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
    add_adapters<T>(shared.stage[kStages - 1], call, at, sums);
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
  T* tile = reinterpret_cast<T*>(&shared);
  finish(tile, p, at, sums);
  __syncthreads();
  write(tile, p, at);
}

template <class T>
void run(const ProductParams& call, cudaStream_t stream) {
  const int64_t weight_row = call.transposed ? call.depth : call.columns;
  const Params p{call, aligned(call.left, call.left_row * 2), aligned(call.weight, weight_row * 2),
                 aligned(call.out, call.columns * 2)};
  const auto blocks =
      static_cast<unsigned>(divide_up(call.rows, kTile) * divide_up(call.columns, kTile));
  const ptx::LaunchShape shape{blocks, kThreads, sizeof(Storage<T>)};
  if (call.transposed) {
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
