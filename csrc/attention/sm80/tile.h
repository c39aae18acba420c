// Tiles of rows in shared memory, and how they get there.
#pragma once

#include "attention/mask.h"
#include "attention/params.h"
#include "ptx/convert.h"
#include "ptx/copy.h"
#include "ptx/core.h"

namespace flashkern::attention::sm80 {

// kRows rows of kDim elements, in chunks of 16 bytes. Chunks turn with the row, so that neither the
// 8 rows of an ldmatrix nor a column of chunks meet the same banks.
template <class T, int kRows, int kDim>
struct Tile {
  static constexpr int kChunkElements = 16 / sizeof(T);
  static constexpr int kChunks = kDim / kChunkElements;

  T data[kRows * kDim];

  FK_DEVICE static int at(int row, int chunk) {
    const int turn = kChunks >= 8 ? row % 8 : row / 2 % 4;
    return row * kDim + (chunk ^ turn) * kChunkElements;
  }
  FK_DEVICE T* chunk(int row, int chunk) { return data + at(row, chunk); }
  FK_DEVICE const T* chunk(int row, int chunk) const { return data + at(row, chunk); }
  FK_DEVICE float element(int row, int column) const {
    return ptx::to_float(data[at(row, column / kChunkElements) + column % kChunkElements]);
  }
};

// The keys (or values) of one KV head, contiguous or in pages.
template <class T>
struct KeyRows {
  const T* data;
  int64_t row, page;
  const int32_t* pages = nullptr;
  int page_size = 1;

  FK_DEVICE KeyRows(const Problem& p, const Matrix& m, const Sequence& s, int kv_head)
      : data(static_cast<const T*>(m.data) + kv_head * m.head), row(m.row), page(m.batch) {
    if (p.page_table != nullptr) {
      pages = p.page_table + s.batch * p.page_table_row;
      page_size = static_cast<int>(p.page_size);
    } else {
      data += s.batch * m.batch + s.k_start * m.row;
    }
  }

  FK_DEVICE const T* operator()(int key) const {
    if (pages == nullptr) return data + key * row;
    return data + pages[key / page_size] * page + key % page_size * row;
  }
};

// The query rows of one KV head: row r is query r / group of the group's head r % group.
template <class T>
struct QueryRows {
  const T* data;
  int64_t head, row;
  int group;

  FK_DEVICE QueryRows(const Problem& p, const Sequence& s, int kv_head)
      : data(static_cast<const T*>(p.query.data) + s.batch * p.query.batch +
             s.q_start * p.query.row + kv_head * p.group() * p.query.head),
        head(p.query.head),
        row(p.query.row),
        group(static_cast<int>(p.group())) {}

  FK_DEVICE const T* operator()(int r) const { return data + r % group * head + r / group * row; }
};

// Elements that do not start at a multiple of 16 bytes take the long way round.
template <class T>
FK_DEVICE void copy_slowly(T* to, const T* from, int count) {
  for (int i = 0; i < static_cast<int>(16 / sizeof(T)); ++i) to[i] = i < count ? from[i] : T{};
}

// Rows [first, first + kRows) of `rows`, by all threads of the block; zeros from row `end` and from
// column `dim` on, which are not read. The copies are the caller's to commit and to wait for.
template <class T, int kRows, int kDim, class Rows>
FK_DEVICE void copy_tile(Tile<T, kRows, kDim>& tile, const Rows& rows, int first, int end, int dim,
                         bool aligned) {
  using Shape = Tile<T, kRows, kDim>;
  for (int i = threadIdx.x; i < kRows * Shape::kChunks; i += blockDim.x) {
    const int row = i / Shape::kChunks, column = i % Shape::kChunks * Shape::kChunkElements;
    const bool there = first + row < end && column < dim;
    const T* from = there ? rows(first + row) + column : rows.data;
    T* to = tile.chunk(row, i % Shape::kChunks);
    if (aligned) {
      ptx::copy_async<16>(to, from, there ? 16 : 0);
    } else {
      copy_slowly(to, from, there ? Shape::kChunkElements : 0);
    }
  }
}

}  // namespace flashkern::attention::sm80
