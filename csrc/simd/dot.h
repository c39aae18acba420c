// Dot products of a few rows with many: what a matrix product is when one side is so thin that
// packing the other would cost more than the product. The wide side is read once, in place, and
// widened in registers.
#pragma once

#include "simd/vec.h"

namespace flashkern::FK_ISA {

using Vec4 = float __attribute__((vector_size(16)));

inline Vec4 quarter(VecF x, int i) {
  Vec4 part;
  std::memcpy(&part, reinterpret_cast<const char*>(&x) + 16 * i, 16);
  return part;
}

// a0 + a1, a2 + a3, b0 + b1, b2 + b3. (GCC 11 has __builtin_shuffle only.)
inline Vec4 sum_neighbours(Vec4 a, Vec4 b) {
  using Lanes = int32_t __attribute__((vector_size(16)));
  return __builtin_shuffle(a, b, Lanes{0, 2, 4, 6}) + __builtin_shuffle(a, b, Lanes{1, 3, 5, 7});
}

// The sums of four vectors, side by side.
inline Vec4 sum_lanes(VecF a, VecF b, VecF c, VecF d) {
  Vec4 x[4] = {quarter(a, 0), quarter(b, 0), quarter(c, 0), quarter(d, 0)};
  for (int i = 1; i < kLanes / 4; ++i) {
    x[0] += quarter(a, i);
    x[1] += quarter(b, i);
    x[2] += quarter(c, i);
    x[3] += quarter(d, i);
  }
  const Vec4 ab = sum_neighbours(x[0], x[1]), cd = sum_neighbours(x[2], x[3]);
  return sum_neighbours(ab, cd);
}

// Columns that kRows rows meet at once: 8 to 24 accumulators, whole groups of four, enough to keep
// two multiply-adds a cycle busy and few enough to leave registers for the operands.
template <int kRows>
inline constexpr int kDotCols = kLanes == 16 ? (kRows == 4 ? 6 : 8)
                                             : (kRows == 1   ? 8
                                                : kRows == 4 ? 2
                                                             : 4);

// acc[r * C + c] += a[r] . b[c] over `depth` numbers; rows of `a` are padded with zeros to whole
// vectors.
template <int kRows, class T>
__attribute__((always_inline)) inline void dot_add(VecF* acc, const float* a, int64_t a_row,
                                                   const T* const* b, int64_t depth) {
  constexpr int C = kDotCols<kRows>;
  const auto step = [&](int64_t k, auto load_b) __attribute__((always_inline)) {
    VecF x[kRows];
    unrolled<kRows>([&](auto r) __attribute__((always_inline)) { x[r] = load(a + r * a_row + k); });
    unrolled<C>([&](auto c) __attribute__((always_inline)) {
      const VecF w = load_b(b[c] + k);
      unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
        acc[r * C + c] = fma(x[r], w, acc[r * C + c]);
      });
    });
  };
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) step(k, [](const T* p) { return load(p); });
  if (k < depth) {
    const int tail = static_cast<int>(depth - k);
    step(k, [tail](const T* p) { return load_partial(p, tail); });
  }
}

}  // namespace flashkern::FK_ISA
