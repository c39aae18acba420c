// The forward pass for a few rows, a decoding step: W is read once, in place, at the speed of
// memory, and everything else rides along.
//
//   h[m] = scale keep(x[m]) A^T         dot products with the rows of A
//   y[m] = x[m] W^T + h[m] B^T + bias   one sum of two dot products for each row of W and B
//
// Rows of x are widened once and stay in cache. A task is 48 rows of W: a block of kDotCols of them
// meets all rows of x, up to four at a time in registers, before the next is read.
#pragma once

#include <memory>

#include "lora/cpu/tiles.h"
#include "lora/plan.h"
#include "simd/dot.h"
#include "threads.h"

namespace flashkern::FK_ISA {

// Float rows that begin at a cache line, padded with zeros to whole lines.
struct ThinRows {
  static constexpr int64_t kLine = 64 / sizeof(float);
  int64_t pitch;
  std::unique_ptr<float[]> memory;
  float* first;

  // One line more than needed: rows a power of two apart would share their cache sets.
  ThinRows(int64_t rows, int64_t width)
      : pitch((width / kLine + 2) * kLine), memory(new float[rows * pitch + kLine]()) {
    const auto place = reinterpret_cast<uintptr_t>(memory.get());
    first = memory.get() + (-place % 64) / sizeof(float);
  }
  float* operator[](int64_t row) const { return first + row * pitch; }
};

// `left` (padded rows) . `right` (rows).
template <class T>
struct DotTerm {
  const ThinRows& left;
  const T* right;
  int64_t depth;  // also from one row of `right` to the next
};

// The left side's rows are taken kRows at a time. The i-th of such groups; the last one ends with
// the last row.
template <int kRows>
inline int64_t group_begin(int64_t i, int64_t rows) {
  return std::min(i * kRows, rows - kRows);
}

// Adds a term's products of all rows and of kDotCols columns from `column` on. Past the last column
// its row stands in: those sums mean nothing.
template <int kRows, class T>
inline void add_block(VecF (*acc)[kRows * kDotCols<kRows>], int64_t rows, int64_t column,
                      int64_t columns, const DotTerm<T>& t) {
  constexpr int kSums = kRows * kDotCols<kRows>;
  constexpr int64_t kDepth = 4096 / sizeof(T);  // at a time, so that L1 keeps the right side
  const T* b[kDotCols<kRows>];
  for (int c = 0; c < kDotCols<kRows>; ++c) {
    b[c] = t.right + std::min<int64_t>(column + c, columns - 1) * t.depth;
  }
  const int64_t ahead = dot_ahead<kRows, T>(t.depth);
  for (int64_t k = 0; k < t.depth; k += kDepth) {
    const int64_t end = std::min(k + kDepth, t.depth);
    for (int64_t i = 0; i * kRows < rows; ++i) {
      VecF sums[kSums];
      unrolled<kSums>([&](auto s) __attribute__((always_inline)) { sums[s] = acc[i][s]; });
      const float* a = t.left[group_begin<kRows>(i, rows)];
      dot_add<kRows>(sums, a, t.left.pitch, b, k, end, i == 0 ? ahead : 0);
      unrolled<kSums>([&](auto s) __attribute__((always_inline)) { acc[i][s] = sums[s]; });
    }
  }
}

// sums[r][c]: what kRows rows of lanes add up to.
template <int kRows>
inline void finish_block(const VecF (&acc)[kRows * kDotCols<kRows>], float* sums) {
  constexpr int C = kDotCols<kRows>;
  float flat[kRows * C];
  unrolled<kRows * C / 4>([&](auto q) __attribute__((always_inline)) {
    const Vec4 four = sum_lanes(acc[4 * q], acc[4 * q + 1], acc[4 * q + 2], acc[4 * q + 3]);
    std::memcpy(flat + 4 * q, &four, sizeof four);
  });
  for (int r = 0; r < kRows; ++r) {
    std::memcpy(sums + r * kFewTaskCols, flat + r * C, C * sizeof(float));
  }
}

template <int kRows, class Put, class... T>
inline void dot_rows(int64_t rows, int64_t columns, const Threads& threads, Put&& put,
                     const DotTerm<T>&... terms) {
  constexpr int kSums = kRows * kDotCols<kRows>;
  threads.run((columns + kFewTaskCols - 1) / kFewTaskCols, [&](int64_t task, int) {
    const int64_t begin = task * kFewTaskCols, end = std::min(begin + kFewTaskCols, columns);
    float sums[kFewRows][kFewTaskCols];
    VecF acc[(kFewRows + kRows - 1) / kRows][kSums];
    for (int64_t j = begin; j < end; j += kDotCols<kRows>) {
      for (int64_t i = 0; i * kRows < rows; ++i) std::fill_n(acc[i], kSums, VecF{});
      (add_block<kRows>(acc, rows, j, columns, terms), ...);
      for (int64_t i = 0; i * kRows < rows; ++i) {
        finish_block<kRows>(acc[i], &sums[group_begin<kRows>(i, rows)][j - begin]);
      }
    }
    for (int64_t i = 0; i < rows; ++i) put(i, begin, end - begin, sums[i]);
  });
}

// Calls put(row, first column, columns, sums) for all sums of the product: at most kFewRows rows.
template <class Put, class... T>
inline void dot_product(int64_t rows, int64_t columns, const Threads& threads, Put&& put,
                        const DotTerm<T>&... terms) {
  const bool threes = (rows + 3) / 4 * 3 >= rows;  // as few groups, and no larger ones than needed
  switch (std::min<int64_t>(rows, threes ? 3 : 4)) {
    case 4:
      return dot_rows<4>(rows, columns, threads, put, terms...);
    case 3:
      return dot_rows<3>(rows, columns, threads, put, terms...);
    case 2:
      return dot_rows<2>(rows, columns, threads, put, terms...);
    case 1:
      return dot_rows<1>(rows, columns, threads, put, terms...);
  }
}

// Rows of x as floats; `kept`: with zeros where dropout drops.
inline ThinRows widen_rows(const LoraForward& p, bool kept) {
  ThinRows wide(p.rows, p.in);
  const int64_t run = (p.in + kWordRun - 1) / kWordRun * kWordRun;
  const std::unique_ptr<uint32_t[]> mask(new uint32_t[kept ? run : 1]);
  for (int64_t i = 0; i < p.rows; ++i) {
    copy_tile({p.dtype, p.x, p.x_row}, {nullptr, i, 1}, 0, p.in, wide[i]);
    if (!kept) continue;
    keep_tile(p.dropout, {nullptr, i, 1}, 0, p.in, mask.get(), run);
    for (int64_t j = 0; j < p.in; ++j) wide[i][j] = mask[j] ? wide[i][j] : 0.f;
  }
  return wide;
}

// What is to happen to a row's finished sums: the bias, the rounding.
template <class X>
struct StoreRow {
  const LoraForward& p;

  void operator()(int64_t row, int64_t column, int64_t n, float* sums) const {
    if (p.bias) {
      const auto* bias = static_cast<const X*>(p.bias) + column;
      for (int64_t c = 0; c < n; ++c) sums[c] += to_float(bias[c]);
    }
    narrow_row(sums, n, static_cast<X*>(p.y) + row * p.out + column);
  }
};

template <class X, class A>
inline void few_rows(const LoraForward& p, const Threads& threads) {
  const LoraAdapters& ad = p.adapters;
  const ThinRows wide = widen_rows(p, false), low(p.rows, ad.rank);
  const auto shrink = [&](const ThinRows& x) {
    const float scale = static_cast<float>(ad.scale[0]);
    auto* h = static_cast<float*>(p.h);
    dot_product(
        p.rows, ad.rank, threads,
        [&](int64_t i, int64_t j, int64_t n, const float* sums) {
          for (int64_t c = 0; c < n; ++c) low[i][j + c] = sums[c] * scale;
          std::memcpy(h + i * ad.rank + j, low[i] + j, n * sizeof(float));
        },
        DotTerm<A>{x, static_cast<const A*>(ad.a), p.in});
  };
  if (p.dropout.threshold) {
    shrink(widen_rows(p, true));
  } else {
    shrink(wide);
  }
  const DotTerm<X> base{wide, static_cast<const X*>(p.weight), p.in};
  const DotTerm<A> expand{low, static_cast<const A*>(ad.b), ad.rank};
  dot_product(p.rows, p.out, threads, StoreRow<X>{p}, base, expand);
}

// Without the adapters: x W^T + bias.
inline void few_rows_base(const LoraForward& p, const Threads& threads) {
  const ThinRows wide = widen_rows(p, false);
  for_dtype(p.dtype, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    const DotTerm<X> base{wide, static_cast<const X*>(p.weight), p.in};
    dot_product(p.rows, p.out, threads, StoreRow<X>{p}, base);
  });
}

inline void few_rows_forward(const LoraForward& p, const Threads& threads) {
  for_dtype(p.dtype, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    if (p.adapters.dtype == DType::kFloat32) {
      few_rows<X, float>(p, threads);
    } else {
      few_rows<X, X>(p, threads);
    }
  });
}

}  // namespace flashkern::FK_ISA
