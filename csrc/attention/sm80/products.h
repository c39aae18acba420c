// The two products of attention for the 16 query rows of a warp, in the registers of mma.sync:
//
//   scores[j][4]   += Q K^T   16 x 8 keys each: (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1),
//                             with g = lane / 4, t = lane % 4
//   out[s][j][4]   += P V     the same, 8 columns each, in strips of up to 64 columns
//
// P never leaves its registers: what a lane holds as a sum of the first product is what it must
// hold as a factor of the second.
//
// bfloat16 and float16 multiply exactly and add in float32. float32 is cut in two TF32 numbers, of
// which three products are summed (small ones first): 21 bits of each factor count.
#pragma once

#include "attention/sm80/tile.h"
#include "ptx/matrix.h"
#include "ptx/mma.h"

namespace flashkern::attention::sm80 {

FK_DEVICE constexpr int strip_columns(int dim) { return dim < 64 ? dim : 64; }

template <int kDim>
using Out = float[kDim / strip_columns(kDim)][strip_columns(kDim) / 8][4];

template <class T, int kDim, int kKeys>
struct Products {
  static constexpr int kScores = kKeys / 8, kStrip = strip_columns(kDim) / 8;

  template <int kRows>
  FK_DEVICE static void scores(float (&d)[kScores][4], const Tile<T, kRows, kDim>& queries, int row,
                               const Tile<T, kKeys, kDim>& keys, int dim) {
    const int lane = ptx::lane_id();
#pragma unroll
    for (int k = 0; k < kDim; k += 16) {
      if (k >= dim) break;
      uint32_t a[4], b[kScores][2];
      ptx::ldmatrix(a, queries.chunk(row + lane % 16, k / 8 + lane / 16));
#pragma unroll
      for (int j = 0; j < kScores; j += 2) {
        uint32_t four[4];
        ptx::ldmatrix(four, keys.chunk(8 * j + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
        b[j][0] = four[0], b[j][1] = four[1];
        b[j + 1][0] = four[2], b[j + 1][1] = four[3];
      }
      ptx::mma_strip<T>(d, a, b);
    }
  }

  FK_DEVICE static void output(Out<kDim>& d, const float (&p)[kScores][4],
                               const Tile<T, kKeys, kDim>& values, int dim) {
    const int lane = ptx::lane_id();
#pragma unroll
    for (int k = 0; k < kKeys; k += 16) {
      const float (&low)[4] = p[k / 8], (&high)[4] = p[k / 8 + 1];
      const uint32_t a[4] = {ptx::pack<T>(low[0], low[1]), ptx::pack<T>(low[2], low[3]),
                             ptx::pack<T>(high[0], high[1]), ptx::pack<T>(high[2], high[3])};
#pragma unroll
      for (int s = 0; s < kDim / 8 / kStrip; ++s) {
        if (s * kStrip * 8 >= dim) break;
        uint32_t b[kStrip][2];
#pragma unroll
        for (int j = 0; j < kStrip; j += 2) {
          uint32_t four[4];
          ptx::ldmatrix_trans(four, values.chunk(k + lane % 16, s * kStrip + j + lane / 16));
          b[j][0] = four[0], b[j][1] = four[1];
          b[j + 1][0] = four[2], b[j + 1][1] = four[3];
        }
        ptx::mma_strip<T>(d[s], a, b);
      }
    }
  }
};

// x = high + low, each a TF32, but for its last 3 bits. An infinity has no low part.
FK_DEVICE void split_tf32(float x, uint32_t& high, uint32_t& low) {
  high = ptx::to_tf32(x);
  const float rest = x - __uint_as_float(high);
  low = ptx::to_tf32(fabsf(rest) <= fabsf(x) ? rest : 0.0f);
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
  ptx::mma_strip<ptx::Tf32>(d, a_low, b_high);
  ptx::mma_strip<ptx::Tf32>(d, a_high, b_low);
  ptx::mma_strip<ptx::Tf32>(d, a_high, b_high);
}

template <int kDim, int kKeys>
struct Products<float, kDim, kKeys> {
  static constexpr int kScores = kKeys / 8, kStrip = strip_columns(kDim) / 8;

  template <int kRows>
  FK_DEVICE static void scores(float (&d)[kScores][4], const Tile<float, kRows, kDim>& queries,
                               int row, const Tile<float, kKeys, kDim>& keys, int dim) {
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
      multiply_tf32x3(d, a, b);
    }
  }

  // Keys 2t and 2t + 1 stand where mma's k has t and t + 4: any order of k will do.
  FK_DEVICE static void output(Out<kDim>& d, const float (&p)[kScores][4],
                               const Tile<float, kKeys, kDim>& values, int dim) {
    const int g = ptx::lane_id() / 4, t = ptx::lane_id() % 4;
#pragma unroll
    for (int k = 0; k < kKeys; k += 8) {
      const float (&four)[4] = p[k / 8];
      const float a[4] = {four[0], four[2], four[1], four[3]};
#pragma unroll
      for (int s = 0; s < kDim / 8 / kStrip; ++s) {
        if (s * kStrip * 8 >= dim) break;
        float b[kStrip][2];
#pragma unroll
        for (int i = 0; i < 2 * kStrip; ++i) {
          b[i / 2][i % 2] = values.element(k + 2 * t + i % 2, (s * kStrip + i / 2) * 8 + g);
        }
        multiply_tf32x3(d[s], a, b);
      }
    }
  }
};

}  // namespace flashkern::attention::sm80
