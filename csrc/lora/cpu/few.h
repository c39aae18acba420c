// The forward pass for a few rows, a decoding step: W is read once, in place, at the speed of
// memory, and everything else rides along.
//
//   h[m] = scale keep(x[m]) A^T         dot products with the rows of A
//   y[m] = x[m] W^T + h[m] B^T + bias   one sum of two dot products for each row of W and B
//
// Rows of x are widened once and stay in L2. A task is 48 rows of W; kDotCols of them at a time
// meet up to four rows of x in registers.
#pragma once

#include <memory>

#include "lora/cpu/tiles.h"
#include "lora/plan.h"
#include "simd/dot.h"
#include "threads.h"

namespace flashkern::FK_ISA {

// Float rows, padded with zeros to whole vectors.
struct ThinRows {
  std::unique_ptr<float[]> memory;
  int64_t pitch = 0;

  ThinRows(int64_t rows, int64_t width)
      : memory(new float[std::max<int64_t>(rows * padded(width), 1)]()), pitch(padded(width)) {}
  float* operator[](int64_t row) const { return memory.get() + row * pitch; }

  // One vector more than needed: rows a power of two apart would share their cache sets.
  static int64_t padded(int64_t width) { return (width / kLanes + 2) * kLanes; }
};

// `left` (padded rows) . `right` (rows).
template <class T>
struct DotTerm {
  const float* left;
  int64_t left_row;
  const T* right;
  int64_t depth;  // also from one row of `right` to the next
};

// sums[r * pitch + c] = the terms' products of rows [row, row + kRows) and kDotCols columns from
// `column` on. Past the last column its row stands in: those sums mean nothing.
template <int kRows, class... T>
inline void dot_block(int64_t row, int64_t column, int64_t columns, float* sums, int64_t pitch,
                      const DotTerm<T>&... terms) {
  constexpr int C = kDotCols<kRows>;
  VecF acc[kRows * C];
  unrolled<kRows * C>([&](auto i) __attribute__((always_inline)) { acc[i] = VecF{}; });
  const auto add = [&](const auto& t) __attribute__((always_inline)) {
    std::remove_cvref_t<decltype(t.right)> b[C];
    for (int c = 0; c < C; ++c) {
      b[c] = t.right + std::min<int64_t>(column + c, columns - 1) * t.depth;
    }
    dot_add<kRows>(acc, t.left + row * t.left_row, t.left_row, b, t.depth);
  };
  (add(terms), ...);
  float flat[kRows * C];
  unrolled<kRows * C / 4>([&](auto q) __attribute__((always_inline)) {
    const Vec4 four = sum_lanes(acc[4 * q], acc[4 * q + 1], acc[4 * q + 2], acc[4 * q + 3]);
    std::memcpy(flat + 4 * q, &four, sizeof four);
  });
  for (int r = 0; r < kRows; ++r) std::memcpy(sums + r * pitch, flat + r * C, C * sizeof(float));
}

// Columns [begin, end) of kRows rows: put(row, begin, n, sums) for each row.
template <int kRows, class Put, class... T>
inline void dot_rows(int64_t row, int64_t begin, int64_t end, int64_t columns, Put&& put,
                     const DotTerm<T>&... terms) {
  float sums[kRows][kFewTaskCols];
  for (int64_t j = begin; j < end; j += kDotCols<kRows>) {
    dot_block<kRows>(row, j, columns, &sums[0][j - begin], kFewTaskCols, terms...);
  }
  for (int r = 0; r < kRows; ++r) put(row + r, begin, end - begin, sums[r]);
}

template <class Put, class... T>
inline void dot_product(int64_t rows, int64_t columns, const Threads& threads, Put&& put,
                        const DotTerm<T>&... terms) {
  threads.run((columns + kFewTaskCols - 1) / kFewTaskCols, [&](int64_t task, int) {
    const int64_t begin = task * kFewTaskCols, end = std::min(begin + kFewTaskCols, columns);
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) dot_rows<4>(row, begin, end, columns, put, terms...);
    switch (rows - row) {
      case 3:
        return dot_rows<3>(row, begin, end, columns, put, terms...);
      case 2:
        return dot_rows<2>(row, begin, end, columns, put, terms...);
      case 1:
        return dot_rows<1>(row, begin, end, columns, put, terms...);
    }
  });
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
    const DotTerm<A> term{x[0], x.pitch, static_cast<const A*>(ad.a), p.in};
    const float scale = static_cast<float>(ad.scale[0]);
    auto* h = static_cast<float*>(p.h);
    dot_product(
        p.rows, ad.rank, threads,
        [&](int64_t i, int64_t j, int64_t n, const float* sums) {
          for (int64_t c = 0; c < n; ++c) low[i][j + c] = sums[c] * scale;
          std::memcpy(h + i * ad.rank + j, low[i] + j, n * sizeof(float));
        },
        term);
  };
  if (p.dropout.threshold) {
    shrink(widen_rows(p, true));
  } else {
    shrink(wide);
  }
  const DotTerm<X> base{wide[0], wide.pitch, static_cast<const X*>(p.weight), p.in};
  const DotTerm<A> expand{low[0], low.pitch, static_cast<const A*>(ad.b), ad.rank};
  dot_product(p.rows, p.out, threads, StoreRow<X>{p}, base, expand);
}

// Without the adapters: x W^T + bias.
inline void few_rows_base(const LoraForward& p, const Threads& threads) {
  const ThinRows wide = widen_rows(p, false);
  for_dtype(p.dtype, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    const DotTerm<X> base{wide[0], wide.pitch, static_cast<const X*>(p.weight), p.in};
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
