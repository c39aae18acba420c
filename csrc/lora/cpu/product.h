// The base product with the low-rank product on top, where torch's BLAS is not the better choice
// (lora/plan.h says where):
//
//   y[m][n] = sum over terms, sum_k left[m][k] right(k, n)  (+ bias[n])
//
// The terms are (x, W) and (h, B) in the forward pass, (dy, W) and (dh, A) in the backward pass:
// the adapter's product rides along as the last few steps of one sum, so y is written once.
//
// A task is a block of rows by a strip of 64 to 256 columns. For each 256 steps of k it packs the
// strip of `right` as panels [256][kGemmCols] (L2; one panel at a time in L1), then walks the rows
// in tiles of 84 x 256. Both are widened to floats on the way, so no float copy of a matrix exists.
// y of 16 bits is summed in floats and rounded once; the sum of an element does not depend on how
// rows and strips are cut.
//
// Goto and van de Geijn: Anatomy of High-Performance Matrix Multiplication (2008).
#pragma once

#include <memory>

#include "lora/cpu/tiles.h"
#include "lora/plan.h"
#include "simd/gemm.h"
#include "threads.h"

namespace flashkern::FK_ISA {

struct Term {
  Matrix left;   // (rows, depth)
  Matrix right;  // (columns, depth), or (depth, columns)
  int64_t depth;
};

struct LinearSum {
  Term terms[2];
  int count;              // of terms
  bool right_transposed;  // right is (columns, depth)
  int64_t rows, columns;
  const void* bias;  // (columns,) of y's dtype, or null
  DType dtype;       // of y and bias
  void* y;           // (rows, columns) contiguous
};

struct ProductScratch {
  float* panels;  // kProductCols x kProductDepth
  float* tile;    // kProductTileRows x kProductDepth
  float* sums;    // rows of a task x kProductCols, where y is no float

  static int64_t floats(int64_t sum_rows) {
    return kProductDepth * (kProductCols + kProductTileRows) + sum_rows * kProductCols;
  }
  explicit ProductScratch(float* base)
      : panels(base),
        tile(panels + kProductDepth * kProductCols),
        sums(tile + kProductDepth * kProductTileRows) {}
};

// Panel p holds columns [p * kGemmCols, ...) of the strip, `depth` rows of them.
inline void pack_panels(const Term& t, bool transposed, int64_t k, int64_t depth, int64_t column,
                        int64_t columns, float* panels) {
  for (int64_t j = 0; j < columns; j += kGemmCols, panels += depth * kGemmCols) {
    const int64_t width = std::min<int64_t>(kGemmCols, columns - j);
    if (transposed) {
      transposed_tile(t.right, column + j, width, k, depth, panels);
    } else {
      copy_tile(t.right, {nullptr, k, depth}, column + j, width, panels);
    }
  }
}

class ProductTask {
 public:
  ProductTask(const LinearSum& p, const ProductCut& cut, int64_t task, const ProductScratch& s)
      : p_(p),
        s_(s),
        row_(task / cut.strips * cut.task_rows),
        rows_(std::min(cut.task_rows, p.rows - row_)),
        column_(task % cut.strips * cut.task_columns),
        columns_(std::min(cut.task_columns, p.columns - column_)) {
    const bool direct = p.dtype == DType::kFloat32;
    sums_ = direct ? static_cast<float*>(p.y) + row_ * p.columns + column_ : s.sums;
    sums_row_ = direct ? p.columns : columns_;
  }

  void run() {
    bool first = true;
    for (int i = 0; i < p_.count; ++i) {
      const Term& t = p_.terms[i];
      for (int64_t k = 0; k < t.depth; k += kProductDepth) {
        add(t, k, std::min(kProductDepth, t.depth - k), first);
        first = false;
      }
    }
    if (first) fill_zero();
    finish();
  }

 private:
  void add(const Term& t, int64_t k, int64_t depth, bool first) {
    pack_panels(t, p_.right_transposed, k, depth, column_, columns_, s_.panels);
    for (int64_t i = 0; i < rows_; i += kProductTileRows) {
      const int64_t count = std::min(kProductTileRows, rows_ - i);
      const Tile left = copy_tile(t.left, {nullptr, row_ + i, count}, k, depth, s_.tile);
      for (int64_t j = 0; j < columns_; j += kGemmCols) {
        const int64_t width = std::min<int64_t>(kGemmCols, columns_ - j);
        const GemmOperands g{
            left.data, left.row, 1, s_.panels + j * depth, width, sums_ + i * sums_row_ + j,
            sums_row_};
        first ? gemm<false>(count, width, depth, g) : gemm<true>(count, width, depth, g);
      }
    }
  }

  void fill_zero() {
    for (int64_t i = 0; i < rows_; ++i) {
      std::memset(sums_ + i * sums_row_, 0, columns_ * sizeof(float));
    }
  }

  // The bias, and the one rounding of a y of 16 bits.
  void finish() {
    if (p_.bias == nullptr && p_.dtype == DType::kFloat32) return;
    float bias[kProductCols] = {};
    for_dtype(p_.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if (p_.bias) widen_row(static_cast<const T*>(p_.bias) + column_, columns_, bias);
      for (int64_t i = 0; i < rows_; ++i) {
        float* sums = sums_ + i * sums_row_;
        T* to = static_cast<T*>(p_.y) + (row_ + i) * p_.columns + column_;
        int64_t j = 0;
        for (; j + kLanes <= columns_; j += kLanes) store(to + j, load(sums + j) + load(bias + j));
        const int tail = static_cast<int>(columns_ - j);
        if (tail) {
          store_partial(to + j, load_partial(sums + j, tail) + load_partial(bias + j, tail), tail);
        }
      }
    });
  }

  const LinearSum& p_;
  const ProductScratch& s_;
  int64_t row_, rows_, column_, columns_;
  float* sums_;
  int64_t sums_row_;
};

inline void run_product(const LinearSum& p, const Threads& threads) {
  const ProductCut cut = product_cut(p.rows, p.columns, threads.count);
  const int64_t workers = std::min<int64_t>(threads.count, cut.tasks());
  const int64_t pitch = ProductScratch::floats(p.dtype == DType::kFloat32 ? 0 : cut.task_rows);
  const std::unique_ptr<float[]> memory(new float[std::max<int64_t>(workers, 1) * pitch]);
  threads.run(cut.tasks(), [&](int64_t task, int thread) {
    const ProductScratch scratch(memory.get() + thread * pitch);
    ProductTask(p, cut, task, scratch).run();
  });
}

}  // namespace flashkern::FK_ISA
