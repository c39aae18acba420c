// Dot products of a few rows with many: what a matrix product is when one side is so thin that
// packing the other would cost more than the product. The wide side is read once, in place, and
// widened in registers.
#pragma once

#include "simd/vec.h"

namespace flashkern::FK_ISA {

using Vec4 = float __attribute__((vector_size(16)));

// Within each four lanes of a and b: a0 b0 a1 b1 | a2 b2 a3 b3, and a0 a1 b0 b1 | a2 a3 b2 b3. (GCC
// 11 has __builtin_shuffle only.)
struct Pair {
  VecF low, high;
};
template <int... I>
inline Pair zip_lanes(VecF a, VecF b, std::integer_sequence<int, I...>) {
  return {__builtin_shuffle(a, b, VecI{(I & ~3) + I % 4 / 2 + I % 2 * kLanes...}),
          __builtin_shuffle(a, b, VecI{(I & ~3) + I % 4 / 2 + 2 + I % 2 * kLanes...})};
}
template <int... I>
inline Pair zip_pairs(VecF a, VecF b, std::integer_sequence<int, I...>) {
  return {__builtin_shuffle(a, b, VecI{(I & ~3) + I % 2 + I % 4 / 2 * kLanes...}),
          __builtin_shuffle(a, b, VecI{(I & ~3) + I % 2 + 2 + I % 4 / 2 * kLanes...})};
}

// The sums of four vectors, side by side.
inline Vec4 sum_lanes(VecF a, VecF b, VecF c, VecF d) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  const Pair ab = zip_lanes(a, b, lanes), cd = zip_lanes(c, d, lanes);
  const Pair both = zip_pairs(ab.low + ab.high, cd.low + cd.high, lanes);
  const VecF quarters = both.low + both.high;
  Vec4 part[kLanes / 4];
  std::memcpy(part, &quarters, sizeof quarters);
  for (int half = kLanes / 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}

// Columns that kRows rows meet at once: 8 to 24 accumulators, whole groups of four, enough to keep
// two multiply-adds a cycle busy and few enough to leave registers for the operands.
template <int kRows>
inline constexpr int kDotCols = kLanes == 16 ? (kRows == 4 ? 6 : 8)
                                             : (kRows == 1   ? 8
                                                : kRows == 4 ? 2
                                                             : 4);

// Where the right side's next rows are asked for, in elements ahead: a core follows a stream by
// itself, but begins anew at each row, and has seen too little of one that is shorter than a page.
template <int kRows, class T>
inline int64_t dot_ahead(int64_t depth) {
  return depth * static_cast<int64_t>(sizeof(T)) <= 4096 ? kDotCols<kRows> * depth : 0;
}

// acc[r * C + c] += a[r] . b[c] over elements [begin, end); rows of `a` are padded with zeros to
// whole vectors.
template <int kRows, class T>
__attribute__((always_inline)) inline void dot_add(VecF* acc, const float* a, int64_t a_row,
                                                   const T* const* b, int64_t begin, int64_t end,
                                                   int64_t ahead) {
  constexpr int C = kDotCols<kRows>;
  const auto step = [&](int64_t k, auto load_b) __attribute__((always_inline)) {
    VecF x[kRows];
    unrolled<kRows>([&](auto r) __attribute__((always_inline)) { x[r] = load(a + r * a_row + k); });
    unrolled<C>([&](auto c) __attribute__((always_inline)) {
      const VecF w = load_b(b[c] + k);
      if (ahead != 0) __builtin_prefetch(b[c] + k + ahead, 0, 2);
      unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
        acc[r * C + c] = fma(x[r], w, acc[r * C + c]);
      });
    });
  };
  int64_t k = begin;
  for (; k + kLanes <= end; k += kLanes) step(k, [](const T* p) { return load(p); });
  if (k < end) {
    const int tail = static_cast<int>(end - k);
    step(k, [tail](const T* p) { return load_partial(p, tail); });
  }
}

}  // namespace flashkern::FK_ISA
