// The micro-GEMM over tiles: C (+)= A B on bfloat16 that lies in L1 or L2, whole tiles only.
//
//   A[m][k] = a[m * a_row + k]           rows of bfloat16
//   B[k][n] = b[k / 2 * b_row + n]       lanes of pairs
//   C[m][n] = c[m * c_row + n]           float32
//
//                 B0       B1     four tiles of C, two of A, two of B: one load for a product, and
//              +-------+-------+  four independent sums, which cover the latency
//   A0         |  C0   |  C1   |
//              +-------+-------+
//   A1         |  C2   |  C3   |
//              +-------+-------+
#pragma once

#include "simd/tile.h"

namespace flashkern::FK_ISA {

struct TileOperands {
  const BFloat16* a;
  int64_t a_row;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
};

// kRows x kCols tiles of C over `steps` tiles of the sum.
template <int kRows, int kCols, bool kAccumulate>
inline void tile_micro(int64_t steps, const TileOperands& g) {
  constexpr int kA = 4, kB = 6;
  const int64_t a_row = 2 * g.a_row, b_row = 4 * g.b_row, c_row = 4 * g.c_row;
  const auto each = [&](auto fn) __attribute__((always_inline)) {
    unrolled<kRows * kCols>([&](auto t) __attribute__((always_inline)) {
      constexpr int i = t / kCols, j = t % kCols;
      fn(std::integral_constant<int, i>(), std::integral_constant<int, j>(),
         g.c + i * kTileSide * g.c_row + j * kTileSide);
    });
  };
  each([&](auto i, auto j, float* c) __attribute__((always_inline)) {
    kAccumulate ? tile_load<2 * i + j>(c, c_row) : tile_zero<2 * i + j>();
  });
  const BFloat16* a = g.a;
  const float* b = g.b;
  for (; steps > 0; --steps, a += kTileDepth, b += kTileSide * g.b_row) {
    unrolled<kCols>([&](auto j) __attribute__((always_inline)) {
      tile_load<kB + j>(b + j * kTileSide, b_row);
    });
    unrolled<kRows>([&](auto i) __attribute__((always_inline)) {
      tile_load<kA + i>(a + i * kTileSide * g.a_row, a_row);
      unrolled<kCols>([&](auto j) __attribute__((always_inline)) {
        tile_multiply<2 * i + j, kA + i, kB + j>();
      });
    });
  }
  each([&](auto i, auto j, float* c)
           __attribute__((always_inline)) { tile_store<2 * i + j>(c, c_row); });
}

template <int kCols, bool kAccumulate>
inline void tile_rows(int64_t M, int64_t steps, TileOperands g) {
  for (; M >= 2; M -= 2) {
    tile_micro<2, kCols, kAccumulate>(steps, g);
    g.a += 2 * kTileSide * g.a_row;
    g.c += 2 * kTileSide * g.c_row;
  }
  if (M > 0) tile_micro<1, kCols, kAccumulate>(steps, g);
}

// One or two steps of the sum over two columns of tiles: B stays in its tiles while A passes, which
// halves the loads.
template <int kSteps>
inline void tile_resident(int64_t M, TileOperands g) {
  constexpr int kA = 2, kB = 4;
  unrolled<2 * kSteps>([&](auto t) __attribute__((always_inline)) {
    tile_load<kB + t>(g.b + t / 2 * kTileSide * g.b_row + t % 2 * kTileSide, 4 * g.b_row);
  });
  for (; M > 0; --M, g.a += kTileSide * g.a_row, g.c += kTileSide * g.c_row) {
    tile_zero<0>();
    tile_zero<1>();
    unrolled<kSteps>([&](auto k) __attribute__((always_inline)) {
      tile_load<kA + k>(g.a + k * kTileDepth, 2 * g.a_row);
      tile_multiply<0, kA + k, kB + 2 * k>();
      tile_multiply<1, kA + k, kB + 2 * k + 1>();
    });
    tile_store<0>(g.c, 4 * g.c_row);
    tile_store<1>(g.c + kTileSide, 4 * g.c_row);
  }
}

inline int64_t tiles_of(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// M and N are rounded up to whole tiles of C and K to whole steps of the sum: what lies there is
// multiplied and written too. Needs a TileScope.
template <bool kAccumulate>
inline void tile_gemm(int64_t M, int64_t N, int64_t K, TileOperands g) {
  M = tiles_of(M, kTileSide), N = tiles_of(N, kTileSide), K = tiles_of(K, kTileDepth);
  for (; N >= 2; N -= 2, g.b += 2 * kTileSide, g.c += 2 * kTileSide) {
    if (!kAccumulate && K == 1) {
      tile_resident<1>(M, g);
    } else if (!kAccumulate && K == 2) {
      tile_resident<2>(M, g);
    } else {
      tile_rows<2, kAccumulate>(M, K, g);
    }
  }
  if (N > 0) tile_rows<1, kAccumulate>(M, K, g);
}

}  // namespace flashkern::FK_ISA
