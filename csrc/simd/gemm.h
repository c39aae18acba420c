// The micro-GEMM: C (+)= A B on float tiles that lie in L1 or L2.
//
//   A[m][k] = a[m * a_row + k * a_col]   any strides: a transposed A costs nothing (it is
//   broadcast) B[k][n] = b[k * b_row + n]           rows contiguous: a row-major matrix, or a
//   packed panel C[m][n] = c[m * c_row + n] M, N, K at least 1
//
// Registers hold kRows x kVecs vectors of C: 6 x 2 of 16 (AVX2), 14 x 2 of 32 (AVX-512), 6 x 2 of
// 16 (portable). Each step of k loads kVecs vectors of B, broadcasts kRows scalars of A, and does
// their product. One panel of B (K x kVecs vectors) stays in L1 while every row block passes over
// it.
//
// Or A and B are pairs of bfloat16 (kMultipliesPairs): each step of k then stands for two terms of
// the sum. A is read in units of bfloat16, at any alignment; a lane of B holds B[2k][n] and
// B[2k + 1][n].
#pragma once

#include <cstdint>

#include "simd/vec.h"

namespace flashkern::FK_ISA {

inline constexpr int kGemmVecs = 2;
inline constexpr int kGemmCols = kGemmVecs * kLanes;
inline constexpr int kGemmRows = kLanes == 16 ? 14 : 6;

template <class A>  // float or BFloat16
struct GemmOperands {
  const A* a;
  int64_t a_row, a_col;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
  float scale = 1;  // of the product of pairs
};

inline VecF gemm_load(const float* a) { return broadcast(*a); }
inline VecF gemm_load(const BFloat16* a) {
  BFloat16Pair pair;
  std::memcpy(&pair, a, sizeof pair);
  return broadcast(pair);
}

template <class A>
inline VecF gemm_step(VecF a, VecF b, VecF c) {
  return std::is_same_v<A, float> ? fma(a, b, c) : multiply_pairs(a, b, c);
}

// `tail` lanes of the last vector exist; whole vectors where kTail is false.
template <int kRows, int kVecs, bool kAccumulate, bool kTail, class A>
void gemm_micro(int64_t K, const GemmOperands<A>& g, int tail) {
  VecF acc[kRows][kVecs];
  const int64_t a_row = g.a_row, a_col = g.a_col, b_row = g.b_row, c_row = g.c_row;
  const A* a = g.a;
  const float* b = g.b;
  float* c = g.c;
  unrolled<kRows * kVecs>(
      [&](auto t) __attribute__((always_inline)) { acc[t / kVecs][t % kVecs] = VecF{}; });
  do {
    VecF row[kVecs];
    unrolled<kVecs>([&](auto v) __attribute__((always_inline)) {
      if constexpr (kTail && v == kVecs - 1) {
        row[v] = load_partial(b + v * kLanes, tail);
      } else {
        row[v] = load(b + v * kLanes);
      }
    });
    unrolled<kRows>([&](auto i) __attribute__((always_inline)) {
      const VecF x = gemm_load(a + i * a_row);
      unrolled<kVecs>([&](auto v) __attribute__((always_inline)) {
        acc[i][v] = gemm_step<A>(x, row[v], acc[i][v]);
      });
    });
    a += a_col;
    b += b_row;
  } while (--K > 0);
  // C joins at the end: a long sum of sums loses less than one long sum.
  unrolled<kRows * kVecs>([&](auto t) __attribute__((always_inline)) {
    constexpr int i = t / kVecs, v = t % kVecs;
    float* to = c + i * c_row + v * kLanes;
    if constexpr (!std::is_same_v<A, float>) acc[i][v] *= g.scale;
    if constexpr (kTail && v == kVecs - 1) {
      if constexpr (kAccumulate) acc[i][v] += load_partial(to, tail);
      store_partial(to, acc[i][v], tail);
    } else {
      if constexpr (kAccumulate) acc[i][v] += load(to);
      store(to, acc[i][v]);
    }
  });
}

// The micro-kernel for `rows` rows, 1 to kRows.
template <int kRows, int kVecs, bool kAccumulate, bool kTail, class A>
inline void gemm_block(int64_t rows, int64_t K, const GemmOperands<A>& g, int tail) {
  if (rows == kRows) {
    gemm_micro<kRows, kVecs, kAccumulate, kTail>(K, g, tail);
  } else if constexpr (kRows > 1) {
    gemm_block<kRows - 1, kVecs, kAccumulate, kTail>(rows, K, g, tail);
  }
}

// Blocks of equal height, give or take a row: 16 rows are 6 + 5 + 5, since a last block of 4, and a
// 2 more so, would wait for its multiply-adds to finish.
template <int kVecs, bool kAccumulate, bool kTail, class A>
inline void gemm_rows(int64_t M, int64_t K, GemmOperands<A> g, int tail) {
  for (int64_t blocks = (M + kGemmRows - 1) / kGemmRows; blocks > 0; --blocks) {
    const int64_t rows = (M + blocks - 1) / blocks;
    gemm_block<kGemmRows, kVecs, kAccumulate, kTail>(rows, K, g, tail);
    g.a += rows * g.a_row;
    g.c += rows * g.c_row;
    M -= rows;
  }
}

template <bool kAccumulate, class A = float>
inline void gemm(int64_t M, int64_t N, int64_t K, GemmOperands<A> g) {
  if (K == 0) {  // no first step to fill the registers: an empty sum is zero
    for (int64_t m = 0; !kAccumulate && m < M; ++m) {
      std::memset(g.c + m * g.c_row, 0, N * sizeof(float));
    }
    return;
  }
  for (; N >= kGemmCols; N -= kGemmCols, g.b += kGemmCols, g.c += kGemmCols) {
    gemm_rows<kGemmVecs, kAccumulate, false>(M, K, g, kLanes);
  }
  for (; N >= kLanes; N -= kLanes, g.b += kLanes, g.c += kLanes) {
    gemm_rows<1, kAccumulate, false>(M, K, g, kLanes);
  }
  if (N > 0) gemm_rows<1, kAccumulate, true>(M, K, g, static_cast<int>(N));
}

}  // namespace flashkern::FK_ISA
