// Tiles: how rows of any dtype become float tiles for the micro-GEMM, and go back.
#pragma once

#include <cstdint>

#include "lora/params.h"
#include "simd/philox.h"
#include "simd/vec.h"

namespace flashkern::FK_ISA {

// Calls fn with a null pointer of the element type.
template <class Fn>
inline void for_dtype(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kFloat32:
      return fn(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return fn(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return fn(static_cast<Half*>(nullptr));
    case DType::kFloat64:  // has kernels of its own
      return;
  }
}

// A matrix with contiguous rows.
struct Matrix {
  DType dtype;
  const void* data;
  int64_t row;
};

// Some rows of a matrix: consecutive ones from `begin`, or those that `index` names.
struct Rows {
  const int64_t* index;
  int64_t begin, count;
  int64_t operator[](int64_t i) const { return index ? index[i] : begin + i; }
  bool consecutive() const { return index == nullptr || index[count - 1] - index[0] == count - 1; }
};

// A float tile: in the matrix itself, or in scratch.
struct Tile {
  const float* data;
  int64_t row;
};

template <class T>
inline void widen_row(const T* from, int64_t n, float* to) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(to + j, load(from + j));
  if (j < n) store_partial(to + j, load_partial(from + j, n - j), n - j);
}

template <class T>
inline void narrow_row(const float* from, int64_t n, T* to) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(to + j, load(from + j));
  if (j < n) store_partial(to + j, load_partial(from + j, n - j), n - j);
}

inline bool in_place(const Matrix& m, const Rows& rows) {
  return m.dtype == DType::kFloat32 && rows.consecutive();
}

inline Tile copy_tile(const Matrix& m, const Rows& rows, int64_t col, int64_t cols,
                      float* scratch) {
  for_dtype(m.dtype, [&](auto* type) {
    const auto* data = static_cast<decltype(type)>(const_cast<void*>(m.data));
    for (int64_t i = 0; i < rows.count; ++i) {
      widen_row(data + rows[i] * m.row + col, cols, scratch + i * cols);
    }
  });
  return {scratch, cols};
}

// Columns [col, col + cols) of the rows as floats, without a copy where they are floats already.
inline Tile read_tile(const Matrix& m, const Rows& rows, int64_t col, int64_t cols,
                      float* scratch) {
  if (!in_place(m, rows)) return copy_tile(m, rows, col, cols, scratch);
  return {static_cast<const float*>(m.data) + rows[0] * m.row + col, m.row};
}

inline void write_tile(const Matrix& m, const Rows& rows, int64_t col, int64_t cols,
                       const float* tile) {
  for_dtype(m.dtype, [&](auto* type) {
    auto* data = static_cast<decltype(type)>(const_cast<void*>(m.data));
    for (int64_t i = 0; i < rows.count; ++i) {
      narrow_row(tile + i * cols, cols, data + rows[i] * m.row + col);
    }
  });
}

// Eklundh's transpose of a square of kLanes vectors: blocks change places, then blocks in blocks.
inline void transpose_square(VecF (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
    VecI low, high;
    for (int l = 0; l < kLanes; ++l) {
      low[l] = l & half ? kLanes + l - half : l;
      high[l] = l & half ? kLanes + l : l + half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & half) continue;
      const VecF a = v[i], b = v[i + half];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + half] = __builtin_shuffle(a, b, high);
    }
  }
}

// to[j][i] = from[i][j] for i < rows, j < cols.
template <class T>
inline void transpose(const T* from, int64_t from_row, int64_t rows, int64_t cols, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= rows; i += kLanes) {
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) {
      VecF v[kLanes];
      for (int l = 0; l < kLanes; ++l) v[l] = load(from + (i + l) * from_row + j);
      transpose_square(v);
      for (int l = 0; l < kLanes; ++l) store(to + (j + l) * rows + i, v[l]);
    }
    for (; j < cols; ++j) {
      for (int l = 0; l < kLanes; ++l)
        to[j * rows + i + l] = to_float(from[(i + l) * from_row + j]);
    }
  }
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) to[j * rows + i] = to_float(from[i * from_row + j]);
  }
}

// The transpose of a tile of a matrix: (cols, rows).
inline Tile transposed_tile(const Matrix& m, int64_t first, int64_t rows, int64_t col, int64_t cols,
                            float* scratch) {
  for_dtype(m.dtype, [&](auto* type) {
    const auto* data = static_cast<decltype(type)>(const_cast<void*>(m.data));
    transpose(data + first * m.row + col, m.row, rows, cols, scratch);
  });
  return {scratch, rows};
}

// ---- dropout ----

inline constexpr int64_t kWordRun = 4 * kLanes;  // random words come in runs of this many

// Masks (0 or -1) of columns [col, col + cols) for each row; rows lie `pitch` apart, a multiple of
// kWordRun that is at least cols.
inline void keep_tile(const LoraDropout& dropout, const Rows& rows, int64_t col, int64_t cols,
                      uint32_t* mask, int64_t pitch) {
  const VecU below = VecU{} + static_cast<uint32_t>(dropout.threshold - 1);
  for (int64_t i = 0; i < rows.count; ++i) {
    uint32_t* words = mask + i * pitch;
    philox_row(*dropout.seed, col, cols, static_cast<uint32_t>(rows[i]), 0, 0, words);
    for (int64_t j = 0; j < cols; j += kLanes) {
      VecU word;
      std::memcpy(&word, words + j, sizeof word);
      const VecI keep = word > below;
      std::memcpy(words + j, &keep, sizeof keep);
    }
  }
}

inline VecF keep_lanes(VecF x, const uint32_t* mask) {
  VecU keep;
  std::memcpy(&keep, mask, sizeof keep);
  return bits_to_float(float_to_bits(x) & keep);
}

}  // namespace flashkern::FK_ISA
