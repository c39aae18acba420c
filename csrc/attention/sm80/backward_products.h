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

template <Stored kA, class T, int R, int C>
FK_DEVICE void load_a(uint32_t (&a)[4], const Tile<T, R, C>& tile, int m, int k) {
  const int lane = ptx::lane_id();
  if constexpr (kA == Stored::kByK) {
    ptx::ldmatrix_trans(a, tile.chunk(k + lane / 16 * 8 + lane % 8, m / 8 + lane / 8 % 2));
  } else {
    ptx::ldmatrix(a, tile.chunk(m + lane % 16, k / 8 + lane / 16));
  }
}

template <Stored kB, int N, class T, int R, int C>
FK_DEVICE void load_b(uint32_t (&b)[N][2], const Tile<T, R, C>& tile, int n, int k) {
  static_assert(N % 2 == 0);
  const int lane = ptx::lane_id();
#pragma unroll
  for (int j = 0; j < N; j += 2) {
    uint32_t four[4];
    if constexpr (kB == Stored::kByK) {
      ptx::ldmatrix_trans(four, tile.chunk(k + lane % 16, n / 8 + j + lane / 16));
    } else {
      const int row = n + 8 * j + lane / 16 * 8 + lane % 8;
      ptx::ldmatrix(four, tile.chunk(row, k / 8 + lane / 8 % 2));
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

// kK: the sum's length, of which the terms from `length` on are zeros.
template <Stored kA, Stored kB, int kK, int M, int N, class T, int RA, int CA, int RB, int CB>
FK_DEVICE void multiply(float (&d)[M][N][4], const Tile<T, RA, CA>& a, int m,
                        const Tile<T, RB, CB>& b, int n, int length = kK) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < kK; k += 16) {
      if (k >= length) break;
      uint32_t left[M][4], right[N][2];
#pragma unroll
      for (int i = 0; i < M; ++i) load_a<kA>(left[i], a, m + 16 * i, k);
      load_b<kB>(right, b, n, k);
#pragma unroll
      for (int i = 0; i < M; ++i) ptx::mma_strip<T>(d[i], left[i], right);
    }
  } else {
    const int g = ptx::lane_id() / 4, t = ptx::lane_id() % 4;
#pragma unroll 1
    for (int k = 0; k < length; k += 8) {
      uint32_t high[N][2], low[N][2];
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) {
        const float x = operand<kB>(b, n + i / 2 * 8 + g, k + t + i % 2 * 4);
        split_tf32(x, high[i / 2][i % 2], low[i / 2][i % 2]);
      }
#pragma unroll
      for (int r = 0; r < M; ++r) {
        uint32_t left_high[4], left_low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x = operand<kA>(a, m + 16 * r + g + i % 2 * 8, k + t + i / 2 * 4);
          split_tf32(x, left_high[i], left_low[i]);
        }
        ptx::mma_strip<ptx::Tf32>(d[r], left_low, high);
        ptx::mma_strip<ptx::Tf32>(d[r], left_high, low);
        ptx::mma_strip<ptx::Tf32>(d[r], left_high, high);
      }
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
