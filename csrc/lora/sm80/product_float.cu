// y = x W^T + bias + h B^T and dx = dy W + keep(dh A) in float32, on plain FMAs: every digit of
// float32, no tensor cores. The plan leaves the base product to cuBLAS, which adds it to the
// adapter's; here it is for calls that ask for it.
//
// Tile and threads: 64 x 64 of y, 16 x 16 threads of 4 x 4, a step 16 deep.
// Shared memory: x^T and W^T tiles of 16 x 68 floats, 8.5 KiB. The next step's numbers are on their
// way to registers while a step is multiplied.
// Numerics: float32 sums of 16 terms each, added in the order of the depth, so that no chain is
// long: the adapter's first (dropout masks them), then the base product's, then the bias.
#include "lora/sm80/kernels.h"
#include "ptx/launch.h"

namespace flashkern::sm80 {
namespace {

constexpr int kTile = kFloatTile, kDepth = 16, kThreads = 256, kPitch = kTile + 4;
constexpr int kAhead = kTile * kDepth / kThreads;

struct Storage {
  float left[kDepth][kPitch], right[kDepth][kPitch];
};

struct Term {
  int64_t depth;
  bool along;  // the right operand's numbers lie together along the depth
};

// Element `index` of a tile: i is a row of x or a column of y.
FK_DEVICE void place(int index, bool along, int& i, int& k) {
  i = along ? index / kDepth : index % kTile;
  k = along ? index % kDepth : index / kTile;
}

// sums += left right^T over one term; left_at(i, k), right_at(i, k) give zeros outside.
template <class Left, class Right>
FK_DEVICE void add_term(Storage& shared, const Term& term, Left&& left_at, Right&& right_at,
                        float (&sums)[4][4]) {
  float left[kAhead], right[kAhead];
  const auto load = [&](int64_t first) {
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      int i, k;
      place(n * kThreads + threadIdx.x, true, i, k);
      left[n] = first + k < term.depth ? left_at(i, first + k) : 0.0f;
      place(n * kThreads + threadIdx.x, term.along, i, k);
      right[n] = first + k < term.depth ? right_at(i, first + k) : 0.0f;
    }
  };
  const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
  load(0);
  for (int64_t first = 0; first < term.depth; first += kDepth) {
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      int i, k;
      place(n * kThreads + threadIdx.x, true, i, k);
      shared.left[k][i] = left[n];
      place(n * kThreads + threadIdx.x, term.along, i, k);
      shared.right[k][i] = right[n];
    }
    __syncthreads();
    if (first + kDepth < term.depth) load(first + kDepth);
    float part[4][4] = {};
#pragma unroll 8
    for (int k = 0; k < kDepth; ++k) {
      const float4 a = *reinterpret_cast<const float4*>(&shared.left[k][row]);
      const float4 b = *reinterpret_cast<const float4*>(&shared.right[k][column]);
      const float as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) part[i][j] = __fmaf_rn(as[i], bs[j], part[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] += part[i][j];
    }
  }
}

FK_DEVICE void add_adapters(Storage& shared, const ProductParams& call, int64_t first_row,
                            int64_t first_column, float (&sums)[4][4]) {
  const int64_t last = min(first_row + kTile, call.rows) - 1;
  const int from = max(call.order.adapter(first_row), 0), to = call.order.adapter(last);
  for (int adapter = from; adapter <= to; ++adapter) {
    if (call.order.empty(adapter)) continue;
    add_term(
        shared, {call.rank, call.factor.k_step == 1},
        [&](int i, int64_t k) {
          const int64_t position = first_row + i;
          if (position > last || call.order.adapter(position) != adapter) return 0.0f;
          return call.low[call.order.row(position) * call.rank + k];
        },
        [&](int i, int64_t k) {
          const int64_t column = first_column + i;
          return column < call.columns ? call.factor.at<float>(adapter, column, k) : 0.0f;
        },
        sums);
  }
}

// A thread's four columns share their four random words.
FK_DEVICE void drop(const ProductParams& call, int64_t row, int64_t column, float (&sums)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t position = min(row + i, call.rows - 1);
    const Philox4 random = call.keep.words(call.order.row(position), column / 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (random.word[j] <= call.keep.below) sums[i][j] = 0.0f;
    }
  }
}

// Rows of whole chunks: `aligned`. A thread's four columns are all there then.
FK_DEVICE void write(const ProductParams& call, bool aligned, int64_t row, int64_t column,
                     const float (&sums)[4][4]) {
  const auto* bias = static_cast<const float*>(call.bias);
  float added[4] = {};
  for (int j = 0; bias != nullptr && j < 4 && column + j < call.columns; ++j) {
    added[j] = bias[column + j];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (row + i >= call.rows || column >= call.columns) return;
    float* out = static_cast<float*>(call.out) + call.order.row(row + i) * call.columns + column;
    const float4 v = {sums[i][0] + added[0], sums[i][1] + added[1], sums[i][2] + added[2],
                      sums[i][3] + added[3]};
    if (aligned) {
      __stcg(reinterpret_cast<float4*>(out), v);
      continue;
    }
    out[0] = v.x;
    if (column + 1 < call.columns) out[1] = v.y;
    if (column + 2 < call.columns) out[2] = v.z;
    if (column + 3 < call.columns) out[3] = v.w;
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    product_float_kernel(const ProductParams call, bool out_aligned) {
  auto& shared = ptx::shared_storage<Storage>();
  const int64_t across = (call.columns + kTile - 1) / kTile;
  const int64_t first_row = blockIdx.x / across * kTile;
  const int64_t first_column = blockIdx.x % across * kTile;
  const int64_t row = first_row + threadIdx.x / 16 * 4;
  const int64_t column = first_column + threadIdx.x % 16 * 4;
  float sums[4][4] = {};
  if (call.low != nullptr) {
    add_adapters(shared, call, first_row, first_column, sums);
    if (!call.keep.all) drop(call, row, column, sums);
  }
  if (call.depth > 0) {
    add_term(
        shared, {call.depth, call.transposed},
        [&](int i, int64_t k) {
          if (first_row + i >= call.rows) return 0.0f;
          const int64_t from = call.order.row(first_row + i);
          return static_cast<const float*>(call.left)[from * call.left_row + k];
        },
        [&](int i, int64_t k) {
          const int64_t at = first_column + i;
          if (at >= call.columns) return 0.0f;
          const auto* weight = static_cast<const float*>(call.weight);
          return call.transposed ? weight[at * call.depth + k] : weight[k * call.columns + at];
        },
        sums);
  }
  write(call, out_aligned, row, column, sums);
}

}  // namespace

void product_float(const ProductParams& call, cudaStream_t stream) {
  if (call.rows == 0 || call.columns == 0) return;
  const auto blocks =
      static_cast<unsigned>(divide_up(call.rows, kTile) * divide_up(call.columns, kTile));
  ptx::launch(product_float_kernel, {blocks, kThreads, sizeof(Storage)}, stream, call,
              aligned(call.out, call.columns * 4));
}

}  // namespace flashkern::sm80
