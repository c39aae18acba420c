// The micro-GEMM: C (+)= A B on float tiles that lie in L1 or L2.
//
//   A[m][k] = a[m * a_row + k * a_col]   any strides: a transposed A costs nothing (it is
//   broadcast) B[k][n] = b[k * b_row + n]           rows contiguous: a row-major matrix, or a
//   packed panel C[m][n] = c[m * c_row + n]
//
// Registers hold kRows x kVecs vectors of C: 6 x 2 of 16 (AVX2), 14 x 2 of 32 (AVX-512), 6 x 2 of
// 16 (portable). Each step of k loads kVecs vectors of B, broadcasts kRows scalars of A, and does
// their product. One panel of B (K x kVecs vectors) stays in L1 while every row block passes over
// it.
#pragma once

#include <cstdint>

#include "simd/vec.h"

namespace flashkern::FK_ISA {

inline constexpr int kGemmVecs = 2;
inline constexpr int kGemmCols = kGemmVecs * kLanes;
inline constexpr int kGemmRows = kLanes == 16 ? 14 : 6;

struct GemmOperands {
  const float* a;
  int64_t a_row, a_col;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
};

// `tail` lanes of the last vector exist; whole vectors where it is kLanes.
template <int kRows, int kVecs, bool kAccumulate, bool kTail>
inline void gemm_micro(int64_t K, const GemmOperands& g, int tail) {
  VecF acc[kRows][kVecs];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVecs; ++v) {
      const float* c = g.c + i * g.c_row + v * kLanes;
      const bool partial = kTail && v == kVecs - 1;
      acc[i][v] = !kAccumulate ? VecF{} : partial ? load_partial(c, tail) : load(c);
    }
  }
  const float* a = g.a;
  const float* b = g.b;
  for (int64_t k = 0; k < K; ++k, a += g.a_col, b += g.b_row) {
    VecF row[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      const bool partial = kTail && v == kVecs - 1;
      row[v] = partial ? load_partial(b + v * kLanes, tail) : load(b + v * kLanes);
    }
    for (int i = 0; i < kRows; ++i) {
      const VecF x = broadcast(a[i * g.a_row]);
      for (int v = 0; v < kVecs; ++v) acc[i][v] = fma(x, row[v], acc[i][v]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVecs; ++v) {
      float* c = g.c + i * g.c_row + v * kLanes;
      if (kTail && v == kVecs - 1) {
        store_partial(c, acc[i][v], tail);
      } else {
        store(c, acc[i][v]);
      }
    }
  }
}

// The rows left over: halve the block until it fits.
template <int kRows, int kVecs, bool kAccumulate, bool kTail>
inline void gemm_rows(int64_t M, int64_t K, GemmOperands g, int tail) {
  while (M >= kRows) {
    gemm_micro<kRows, kVecs, kAccumulate, kTail>(K, g, tail);
    g.a += kRows * g.a_row;
    g.c += kRows * g.c_row;
    M -= kRows;
  }
  if constexpr (kRows > 1) {
    if (M > 0) gemm_rows<(kRows + 1) / 2, kVecs, kAccumulate, kTail>(M, K, g, tail);
  }
}

template <bool kAccumulate>
inline void gemm(int64_t M, int64_t N, int64_t K, GemmOperands g) {
  for (; N >= kGemmCols; N -= kGemmCols, g.b += kGemmCols, g.c += kGemmCols) {
    gemm_rows<kGemmRows, kGemmVecs, kAccumulate, false>(M, K, g, kLanes);
  }
  for (; N >= kLanes; N -= kLanes, g.b += kLanes, g.c += kLanes) {
    gemm_rows<kGemmRows, 1, kAccumulate, false>(M, K, g, kLanes);
  }
  if (N > 0) gemm_rows<kGemmRows, 1, kAccumulate, true>(M, K, g, static_cast<int>(N));
}

}  // namespace flashkern::FK_ISA
