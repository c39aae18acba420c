// One product of an attention kernel: C (+)= A B by whatever multiplies its type. Vectors take any
// A and scale as they store; tiles take rows of A alone, write whole tiles of C and leave the scale
// to whoever reads them.
#pragma once

#include "attention/cpu/rows.h"

namespace flashkern::FK_ISA::attention {

// A[m][k] lies at data + m * row + k / kStep * step; for tiles, `step` counts for nothing.
template <class T>
struct Left {
  const Factor<T>* data;
  int64_t row, step = kStep<T>;
};

struct Right {
  const float* data;  // for pairs and tiles, two terms of the sum to a row
  int64_t row;
};

// What is left of a factor after a product.
template <class T>
inline float factor_left(float factor) {
  return kInTiles<T> ? factor : 1.f;
}

// `K` counts terms of the sum.
template <class T, bool kAccumulate>
inline void multiply(int64_t M, int64_t N, int64_t K, const Left<T>& a, const Right& b, float* c,
                     int64_t c_row, [[maybe_unused]] float factor = 1) {
  if constexpr (kInTiles<T>) {
    tile_gemm<kAccumulate>(M, N, K, {a.data, a.row, b.data, b.row, c, c_row});
  } else {
    gemm<kAccumulate, Factor<T>>(M, N, (K + kStep<T> - 1) / kStep<T>,
                                 {a.data, a.row, a.step, b.data, b.row, c, c_row, factor});
  }
}

}  // namespace flashkern::FK_ISA::attention
