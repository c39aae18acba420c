// The tile of product.cu: its stages in shared memory, its place, and the copies that fill a stage.
#pragma once

#include "lora/sm80/kernels.h"

namespace flashkern::sm80::tiles {

constexpr int kTile = kProductTile, kDepth = 32, kThreads = 128, kStages = 3;
constexpr unsigned kBand = 8;
constexpr int kStrips = 8, kSlabs = 4;  // a warp's 64 x 64: slabs of 16 rows, strips of 8 columns
constexpr int kPitch = kTile + 8;       // of the finished tile: 16 bytes more turn the banks

using Sums = float[kSlabs][kStrips][4];

template <class T>
struct Stage {
  alignas(1024) T left[kTile * kDepth];
  alignas(1024) T right[kTile * kDepth];
};

template <class T, bool kBase>
struct Storage {
  union {
    Stage<T> stage[kBase ? kStages : 1];  // without a base product: the adapter's tiles
    T finished[kTile * kPitch];
  };
};

struct Params {
  ProductParams call;
  bool left_aligned, weight_aligned, out_aligned;
  bool low_paired, factor_paired;  // two neighbours along the rank may be loaded as one
};

// This block's tile, and where a lane's sums lie in it.
struct Place {
  int64_t row, column;
  int warp_row, warp_column, lane;

  FK_DEVICE explicit Place(const ProductParams& call) {
    const auto down = static_cast<unsigned>((call.rows + kTile - 1) / kTile);
    const auto across = static_cast<unsigned>((call.columns + kTile - 1) / kTile);
    const unsigned band = blockIdx.x / (kBand * across) * kBand;
    const unsigned height = min(kBand, down - band), within = blockIdx.x - band * across;
    row = int64_t{band + within % height} * kTile;
    column = int64_t{within / height} * kTile;
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
FK_DEVICE void copy_edge(Stage<T>& stage, const Params& p, const Place& at, int64_t k) {
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

}  // namespace flashkern::sm80::tiles
