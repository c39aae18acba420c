// The two products of attention for the 16 kStrips query rows of a warp, in the registers of
// mma.sync:
//
//   scores[m][j][4] += Q K^T   strip m, 8 keys each, with g = lane / 4, t = lane % 4:
//                              (g, 2t)  (g, 2t + 1)  (g + 8, 2t)  (g + 8, 2t + 1)
//   sums[m][j][4]   += P V     the same, 8 columns each
//
// P never leaves its registers: what a lane holds as a sum of the first product is what it must
// hold as a factor of the second. Every 32 keys or columns that are read from shared memory meet
// all strips: with two of them a product of 16 x 8 x 16 costs 128 bytes of K or V, not 256. Columns
// beyond head_dim are zeros; half precision multiplies them, float32 stops at `dim`.
//
// bfloat16 and float16 multiply exactly and add in float32. float32 is cut in two TF32 numbers, of
// which three products are summed (small ones first): 21 bits of each factor count. Fasi, Higham,
// Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor cores (2021).
#pragma once

#include "attention/sm80/tile.h"
#include "ptx/matrix.h"
#include "ptx/mma.h"

namespace flashkern::attention::sm80 {

template <int N>
using Strip = float[N][4];

// Products j to j + kCount - 1 of a strip.
template <int kCount, int N>
FK_DEVICE Strip<kCount>& part(Strip<N>& strip, int j) {
  return reinterpret_cast<Strip<kCount>&>(strip[j]);
}

template <class T, int kDim, int kKeys, int kStrips>
struct Products {
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

// x = high + low, each a TF32, but for its last 3 bits. What high can't hold is low's: an infinity
// there meets one factor, the other's high part, and gives NaN only where that is zero.
FK_DEVICE void split_tf32(float x, uint32_t& high, uint32_t& low) {
  constexpr float kMost = 0x1.ffcp127f;
  high = ptx::to_tf32(fminf(fmaxf(x, -kMost), kMost));
  low = ptx::to_tf32(x - __uint_as_float(high));
}

// d += A B, of factors that are cut. Tensor cores cut their sums too, towards zero, so that a long
// one would shrink with every step: only the three products meet there, and d is rounded.
template <int N>
FK_DEVICE void multiply_tf32x3(float (&d)[N][4], const uint32_t (&a_high)[4],
                               const uint32_t (&a_low)[4], const uint32_t (&b_high)[N][2],
                               const uint32_t (&b_low)[N][2]) {
  float step[N][4] = {};
  ptx::mma_strip<ptx::Tf32>(step, a_low, b_high);
  ptx::mma_strip<ptx::Tf32>(step, a_high, b_low);
  ptx::mma_strip<ptx::Tf32>(step, a_high, b_high);
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) d[i / 4][i % 4] += step[i / 4][i % 4];
}

template <int N>
FK_DEVICE void multiply_tf32x3(float (&d)[N][4], const float (&a)[4], const float (&b)[N][2]) {
  uint32_t a_high[4], a_low[4], b_high[N][2], b_low[N][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) split_tf32(a[i], a_high[i], a_low[i]);
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) {
    split_tf32(b[i / 2][i % 2], b_high[i / 2][i % 2], b_low[i / 2][i % 2]);
  }
  multiply_tf32x3(d, a_high, a_low, b_high, b_low);
}

// float32 has one strip; of its keys or columns 64 at a time.
template <int kDim, int kKeys>
struct Products<float, kDim, kKeys, 1> {
  static constexpr int kScores = kKeys / 8, kColumns = kDim / 8;
  static constexpr int kGroup = kColumns < 8 ? kColumns : 8;
  using Scores = Strip<kScores>[1];
  using Sums = Strip<kColumns>[1];

  template <int kRows>
  FK_DEVICE static void scores(Scores& d, const Tile<float, kRows, kDim>& queries, int row,
                               const Tile<float, kKeys, kDim>& keys, int dim) {
    const int g = ptx::lane_id() / 4, t = ptx::lane_id() % 4;
#pragma unroll 2
    for (int k = 0; k < dim; k += 8) {
      float a[4], b[kScores][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = queries.element(row + g + i % 2 * 8, k + t + i / 2 * 4);
#pragma unroll
      for (int i = 0; i < 2 * kScores; ++i) {
        b[i / 2][i % 2] = keys.element(i / 2 * 8 + g, k + t + i % 2 * 4);
      }
      multiply_tf32x3(d[0], a, b);
    }
  }

  // Keys 2t and 2t + 1 stand where mma's k has t and t + 4: any order of k will do.
  FK_DEVICE static void output(Sums& d, const Scores& p, const Tile<float, kKeys, kDim>& values,
                               int dim) {
    const int g = ptx::lane_id() / 4, t = ptx::lane_id() % 4;
#pragma unroll
    for (int k = 0; k < kKeys; k += 8) {
      const float (&four)[4] = p[0][k / 8];
      const float a[4] = {four[0], four[2], four[1], four[3]};
#pragma unroll
      for (int j = 0; j < kColumns; j += kGroup) {
        if (8 * j >= dim) break;
        float b[kGroup][2];
#pragma unroll
        for (int i = 0; i < 2 * kGroup; ++i) {
          b[i / 2][i % 2] = values.element(k + 2 * t + i % 2, (j + i / 2) * 8 + g);
        }
        multiply_tf32x3(part<kGroup>(d[0], j), a, b);
      }
    }
  }
};

}  // namespace flashkern::attention::sm80
