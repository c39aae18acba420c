// Rows become columns, kLanes of them at a time: a square of vectors is turned in registers.
#pragma once

#include "simd/vec.h"

namespace flashkern::FK_ISA {

// Squares of kStep x kStep that face each other across the diagonal change places, within every
// square of twice the size.
template <int kStep, int... I>
__attribute__((always_inline)) inline void swap_squares(VecF* x, std::integer_sequence<int, I...>) {
  unrolled<kLanes>([&](auto i) __attribute__((always_inline)) {
    if constexpr ((i & kStep) == 0) {
      const VecF a = x[i], b = x[i + kStep];
      x[i] = __builtin_shuffle(a, b, VecI{(I & kStep ? I - kStep + kLanes : I)...});
      x[i + kStep] = __builtin_shuffle(a, b, VecI{(I & kStep ? I + kLanes : I + kStep)...});
    }
  });
}

template <int kStep = kLanes / 2>
__attribute__((always_inline)) inline void transpose(VecF* x) {
  swap_squares<kStep>(x, std::make_integer_sequence<int, kLanes>());
  if constexpr (kStep > 1) transpose<kStep / 2>(x);
}

// to[d * to_row + lane] = factor * row(lane)[d] for d < n; lanes from `live` on are zeros. Pairs
// are moved as they are.
template <class Row>
inline void transpose_rows(Row&& row, int64_t live, int64_t n, float factor, float* to,
                           int64_t to_row) {
  constexpr bool kPairs = std::is_same_v<decltype(row(0)), const BFloat16Pair*>;
  for (int64_t d = 0; d < n; d += kLanes) {
    const int width = static_cast<int>(n - d < kLanes ? n - d : kLanes);
    VecF x[kLanes] = {};
    unrolled<kLanes>([&](auto i) __attribute__((always_inline)) {
      if (i < live) x[i] = width == kLanes ? load(row(i) + d) : load_partial(row(i) + d, width);
    });
    transpose(x);
    unrolled<kLanes>([&](auto i) __attribute__((always_inline)) {
      if (i < width) store(to + (d + i) * to_row, kPairs ? x[i] : x[i] * factor);
    });
  }
}

}  // namespace flashkern::FK_ISA
