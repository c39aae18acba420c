// The two products of attention for the 16 kStrips query rows of a warp, in the registers of
// mma.sync:
//
//   scores[m][j][4]  += Q K^T   strip m, 8 keys each: (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t +
//   1)
//                               with g = lane / 4, t = lane % 4
//   sums[m][j][4]    += P V     the same, 8 columns each
//
// P never leaves its registers: what a lane holds as a sum of the first product is what it must
// hold as a factor of the second. Every 32 keys or columns that are read from shared memory meet
// all strips: with two of them a product of 16 x 8 x 16 costs 128 bytes of K or V, not 256. Columns
// beyond head_dim are zeros; half precision multiplies them, float32 stops at `dim`.
#pragma once

#include "attention/sm80/products.h"

namespace flashkern::attention::sm80 {

template <int N>
using Strip = float[N][4];

// Products j to j + kCount - 1 of a strip.
template <int kCount, int N>
FK_DEVICE float (&part(float (&strip)[N][4], int j))
    [kCount][4] { return reinterpret_cast<float (&)[kCount][4]>(strip[j]); }

template <class T, int kDim, int kKeys, int kStrips>
struct StripProducts {
  static constexpr int kScores = kKeys / 8, kColumns = kDim / 8;
  using Scores = Strip<kScores>[kStrips];
  using Sums = Strip<kColumns>[kStrips];

  template <int kRows>
  FK_DEVICE static void scores(Scores& d, const Tile<T, kRows, kDim>& queries, int row,
                               const Tile<T, kKeys, kDim>& keys, int) {
    const uint32_t lane = ptx::lane_id();
    const Blocks<T, kRows, kDim> q(queries, row + lane % 16, lane / 16);
    const Blocks<T, kKeys, kDim> k(keys, lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int c = 0; c < kDim / 16; ++c) {
      uint32_t a[kStrips][4];
#pragma unroll
      for (int m = 0; m < kStrips; ++m) ptx::ldmatrix(a[m], q(m, c));
#pragma unroll
      for (int j = 0; j < kScores; j += 4) {
        uint32_t b[2][4];
        ptx::ldmatrix(b[0], k(j / 2, c));
        ptx::ldmatrix(b[1], k(j / 2 + 1, c));
        multiply(d, j, a, b);
      }
    }
  }

  FK_DEVICE static void output(Sums& d, const Scores& p, const Tile<T, kKeys, kDim>& values, int) {
    const uint32_t lane = ptx::lane_id();
    const Blocks<T, kKeys, kDim> v(values, lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      uint32_t a[kStrips][4];
#pragma unroll
      for (int m = 0; m < kStrips; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float (&four)[4] = p[m][2 * k + i / 2];
          a[m][i] = ptx::pack<T>(four[i % 2 * 2], four[i % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int j = 0; j < kColumns; j += 4) {
        uint32_t b[2][4];
        ptx::ldmatrix_trans(b[0], v(k, j / 2));
        ptx::ldmatrix_trans(b[1], v(k, j / 2 + 1));
        multiply(d, j, a, b);
      }
    }
  }

 private:
  // Two 16 x 16 blocks of B, each two products wide.
  template <int N>
  FK_DEVICE static void multiply(Strip<N> (&d)[kStrips], int j, const uint32_t (&a)[kStrips][4],
                                 const uint32_t (&b)[2][4]) {
#pragma unroll
    for (int m = 0; m < kStrips; ++m) {
      ptx::mma_strip<T>(part<4>(d[m], j), a[m], reinterpret_cast<const uint32_t (&)[4][2]>(b));
    }
  }
};

// float32 has one strip and takes the products of products.h.
template <int kDim, int kKeys>
struct StripProducts<float, kDim, kKeys, 1> {
  static constexpr int kScores = kKeys / 8, kColumns = kDim / 8;
  using Scores = Strip<kScores>[1];
  using Sums = Strip<kColumns>[1];
  using Multiply = Products<float, kDim, kKeys>;

  template <int kRows>
  FK_DEVICE static void scores(Scores& d, const Tile<float, kRows, kDim>& queries, int row,
                               const Tile<float, kKeys, kDim>& keys, int dim) {
    Multiply::scores(d[0], queries, row, keys, dim);
  }

  FK_DEVICE static void output(Sums& d, const Scores& p, const Tile<float, kKeys, kDim>& values,
                               int dim) {
    Multiply::output(reinterpret_cast<Out<kDim>&>(d[0]), p[0], values, dim);
  }
};

}  // namespace flashkern::attention::sm80
