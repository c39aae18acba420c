// Products of tiles in shared memory for the backward pass: D += A B, a warp's 16 M x 8 N of D in
// the registers of mma.sync, d[i][j] as in ptx/mma.h.
//
// A is (m, k) and B is (k, n). An operand is stored by rows of m or of n, k along a row; or, where
// it is `ByK`, by rows of k.
#pragma once

#include "attention/sm80/products.h"
#include "attention/sm80/tile.h"
#include "ptx/matrix.h"
#include "ptx/mma.h"

namespace flashkern::attention::sm80 {

enum class Stored { kByRows, kByK };

// The compiler knows of these that they are small and not negative, which shortens addresses.
FK_DEVICE int lane_of_warp() { return static_cast<int>(ptx::lane_id() & 31); }

// Where the chunk (own_row, own_chunk) of the block at (row, column) lies in a tile: own_row < 8 or
// a row of 16, own_chunk 0 or 1; row and column are multiples of 8. Chunks turn with the own row
// alone, so that the rest is a sum and an exclusive or.
template <class Tile>
FK_DEVICE int block_at(int own_row, int own_chunk, int row, int column) {
  constexpr int kColumns = Tile::kChunks * Tile::kChunkElements;
  constexpr int kTurned = Tile::kChunks < 8 ? kColumns : 8 * Tile::kChunkElements;
  const int turned = column % kTurned;
  return (Tile::at(own_row, own_chunk) ^ turned) + (row * kColumns + column - turned);
}

// What a lane passes to ldmatrix for a 16 x 16 block.
template <class T, int R, int C>
FK_DEVICE const T* block_row(const Tile<T, R, C>& tile, int own_row, int own_chunk, int row,
                             int column) {
  return tile.data + block_at<Tile<T, R, C>>(own_row, own_chunk, row, column);
}

template <Stored kA, class T, int R, int C>
FK_DEVICE void load_a(uint32_t (&a)[4], const Tile<T, R, C>& tile, int m, int k) {
  const int lane = lane_of_warp();
  if constexpr (kA == Stored::kByK) {
    ptx::ldmatrix_trans(a, block_row(tile, lane / 16 * 8 + lane % 8, lane / 8 % 2, k, m));
  } else {
    ptx::ldmatrix(a, block_row(tile, lane % 16, lane / 16, m, k));
  }
}

template <Stored kB, int N, class T, int R, int C>
FK_DEVICE void load_b(uint32_t (&b)[N][2], const Tile<T, R, C>& tile, int n, int k) {
  static_assert(N % 2 == 0);
  const int lane = lane_of_warp();
#pragma unroll
  for (int j = 0; j < N; j += 2) {
    uint32_t four[4];
    if constexpr (kB == Stored::kByK) {
      ptx::ldmatrix_trans(four, block_row(tile, lane % 16, lane / 16, k, n + 8 * j));
    } else {
      const int row = lane / 16 * 8 + lane % 8;
      ptx::ldmatrix(four, block_row(tile, row, lane / 8 % 2, n + 8 * j, k));
    }
    b[j][0] = four[0], b[j][1] = four[1];
    b[j + 1][0] = four[2], b[j + 1][1] = four[3];
  }
}

// Element (row, k) of an operand of float32.
template <Stored kHow, int R, int C>
FK_DEVICE float operand(const Tile<float, R, C>& tile, int row, int k) {
  return kHow == Stored::kByK ? tile.element(k, row) : tile.element(row, k);
}

// float32: as three products of TF32 (products.h), 8 columns of B at a time; more than 64 columns
// in two loops, for the factors of all of them would crowd the registers. Any order of k will do:
// first those of an even number of bits, 0, 3, 5, 6, then their neighbours, so that a warp meets no
// bank twice, in tiles by rows (their remainders by 4 differ) and by k (so do their halves).
template <Stored kA, Stored kB, int M, int N, int RA, int CA, int RB, int CB>
FK_DEVICE void multiply_tf32(float (&d)[M][N][4], const Tile<float, RA, CA>& a, int m,
                             const Tile<float, RB, CB>& b, int n, int length) {
  const int g = lane_of_warp() / 4, t = lane_of_warp() % 4, even = 2 * t ^ t % 2 ^ t / 2;
  if constexpr (N > 8) {
    static_assert(M == 1);
    using Half = float[1][N / 2][4];
    multiply_tf32<kA, kB>(reinterpret_cast<Half&>(d[0][0]), a, m, b, n, length);
    multiply_tf32<kA, kB>(reinterpret_cast<Half&>(d[0][N / 2]), a, m, b, n + 4 * N, length);
    return;
  }
#pragma unroll 1
  for (int k = 0; k < length; k += 8) {
    uint32_t high[M][4], low[M][4];
#pragma unroll
    for (int i = 0; i < 4 * M; ++i) {
      const float x = operand<kA>(a, m + i / 4 * 16 + g + i % 2 * 8, k + (even ^ i % 4 / 2));
      split_tf32(x, high[i / 4][i % 4], low[i / 4][i % 4]);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      uint32_t b_high[1][2], b_low[1][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float x = operand<kB>(b, n + 8 * j + g, k + (even ^ i));
        split_tf32(x, b_high[0][i], b_low[0][i]);
      }
#pragma unroll
      for (int i = 0; i < M; ++i) {
        multiply_tf32x3(part<1>(d[i], j), high[i], low[i], b_high, b_low);
      }
    }
  }
}

// kK: the sum's length, of which the terms from `length` on are zeros. One test alone: a branch
// keeps the loads of a step from those before it.
template <Stored kA, Stored kB, int kK, int M, int N, class T, int RA, int CA, int RB, int CB>
FK_DEVICE void multiply(float (&d)[M][N][4], const Tile<T, RA, CA>& a, int m,
                        const Tile<T, RB, CB>& b, int n, int length = kK) {
  if constexpr (sizeof(T) == 4) {
    multiply_tf32<kA, kB>(d, a, m, b, n, length);
  } else {
#pragma unroll
    for (int k = 0; k < kK; k += 16) {
      if (k == kK / 4 * 3 && k >= length) break;
      uint32_t left[M][4], right[N][2];
#pragma unroll
      for (int i = 0; i < M; ++i) load_a<kA>(left[i], a, m + 16 * i, k);
      load_b<kB>(right, b, n, k);
#pragma unroll
      for (int i = 0; i < M; ++i) ptx::mma_strip<T>(d[i], left[i], right);
    }
  }
}

// The same where A is what the lanes hold as the sums x of another product: k is x's column.
template <class T, int M, int K, int N, int R, int C>
FK_DEVICE void multiply_held(float (&d)[M][N][4], const float (&x)[M][K][4], const Tile<T, R, C>& b,
                             int k) {
#pragma unroll
  for (int j = 0; j < K; j += 2) {
    uint32_t right[N][2];
    load_b<Stored::kByK>(right, b, 0, k + 8 * j);
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const float (&low)[4] = x[i][j], (&high)[4] = x[i][j + 1];
      const uint32_t left[4] = {ptx::pack<T>(low[0], low[1]), ptx::pack<T>(low[2], low[3]),
                                ptx::pack<T>(high[0], high[1]), ptx::pack<T>(high[2], high[3])};
      ptx::mma_strip<T>(d[i], left, right);
    }
  }
}

}  // namespace flashkern::attention::sm80
