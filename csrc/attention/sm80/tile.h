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
struct alignas(128) Tile {
  static constexpr int kChunkElements = 16 / sizeof(T);
  static constexpr int kChunks = kDim / kChunkElements;

  T data[kRows * kDim];

  FK_DEVICE static constexpr int turn(int row) { return kChunks >= 8 ? row & 7 : row >> 1 & 3; }
  FK_DEVICE static int at(int row, int chunk) {
    return row * kDim + (chunk ^ turn(row)) * kChunkElements;
  }
  FK_DEVICE T* chunk(int row, int chunk) { return data + at(row, chunk); }
  FK_DEVICE const T* chunk(int row, int chunk) const { return data + at(row, chunk); }
  FK_DEVICE float element(int row, int column) const {
    return ptx::to_float(data[at(row, column / kChunkElements) + column % kChunkElements]);
  }
};

// What a lane passes to ldmatrix for the 16 x 16 blocks of a tile: block (r, c) starts at row 16 r
// and at chunk 2 c. `row` and `chunk` (0 or 1) are the lane's own within a block. Where a block
// lies changes the address by a constant that is added, and by one that turns the chunk.
template <class T, int kRows, int kDim>
class Blocks {
 public:
  using Shape = Tile<T, kRows, kDim>;

  FK_DEVICE Blocks(const Shape& tile, int row, int chunk)
      : own_(ptx::shared_address(tile.chunk(row, chunk))) {}

  FK_DEVICE uint32_t operator()(int r, int c) const {
    constexpr int kTurned = Shape::kChunks < 8 ? Shape::kChunks : 8;
    const int turned = 2 * c % kTurned, whole = 2 * c - turned;
    return (own_ ^ 16u * turned) + r * 16 * kDim * sizeof(T) + 16 * whole;
  }

 private:
  uint32_t own_;
};

// The keys (or values) of one KV head, contiguous or in pages; in beam search each of them in the
// row of the batch that the beam table names, where kBeams allows for one. Nobody has looked at the
// tables: a wrong number must not be an address, so it counts as the last page or beam.
template <class T, bool kBeams = false>
struct KeyRows {
  const T* data;
  int64_t row, batch;
  const int32_t* pages = nullptr;
  const int32_t* beams = nullptr;
  int page_size = 1, page_row = 0;
  unsigned last_page = 0, last_beam = 0;

  FK_DEVICE KeyRows(const Problem& p, const Matrix& m, const Sequence& s, int kv_head)
      : data(static_cast<const T*>(m.data) + kv_head * m.head), row(m.row), batch(m.batch) {
    int64_t first = s.batch;
    if (kBeams && p.beam_table != nullptr) {
      beams = p.beam_table + first * p.beam_table_row;
      last_beam = static_cast<unsigned>(p.beams - 1);
      first = first / p.beams * p.beams;
    }
    if (p.page_table != nullptr) {
      pages = p.page_table + first * p.page_table_row;
      page_size = static_cast<int>(p.page_size);
      page_row = static_cast<int>(p.page_table_row);
      last_page = static_cast<unsigned>(p.pages - 1);
    } else {
      data += first * m.batch + s.k_start * m.row;
    }
  }

  FK_DEVICE bool contiguous() const { return pages == nullptr && (!kBeams || beams == nullptr); }

  FK_DEVICE const T* operator()(int key) const {
    const unsigned beam = beam_of(key);
    if (pages == nullptr) return data + beam * batch + key * row;
    return data + page_of(beam, key) * batch + key % page_size * row;
  }

 private:
  // Which of the prompt's beams holds a key, and which page of the cache holds it of that beam.
  FK_DEVICE unsigned beam_of(int key) const {
    if (!kBeams || beams == nullptr) return 0;
    return min(static_cast<unsigned>(beams[key]), last_beam);
  }
  FK_DEVICE unsigned page_of(unsigned beam, int key) const {
    return min(static_cast<unsigned>(pages[beam * int64_t{page_row} + key / page_size]), last_page);
  }
};

// Whose query a row of a KV head is: rows are packed query by query, beam by beam (where beams
// share their keys), head by head of the group.
struct RowOwner {
  int batch, head, query;

  FK_DEVICE RowOwner(const Problem& p, const Sequence& s, int kv_head, int r) {
    const int group = static_cast<int>(p.group()), beams = static_cast<int>(p.row_beams);
    batch = static_cast<int>(s.batch) * beams + r / group % beams;
    head = kv_head * group + r % group;
    query = r / (group * beams);
  }
};

// The query rows of one KV head.
template <class T>
struct QueryRows {
  const T* data;
  int64_t batch, head, row;
  int group, beams;

  FK_DEVICE QueryRows(const Problem& p, const Matrix& m, const Sequence& s, int kv_head)
      : data(static_cast<const T*>(m.data) + s.batch * p.row_beams * m.batch + s.q_start * m.row +
             kv_head * p.group() * m.head),
        batch(m.batch),
        head(m.head),
        row(m.row),
        group(static_cast<int>(p.group())),
        beams(static_cast<int>(p.row_beams)) {}

  FK_DEVICE const T* operator()(int r) const {
    const int rest = r / group;
    return data + r % group * head + rest % beams * batch + rest / beams * row;
  }
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

// The same where each row lies for itself (in a page, in a beam's row), aligned, by kThreads: a
// lane finds the address of a row or two, and those that copy the row's chunks take it from there.
template <int kThreads, class T, int kRows, int kDim, class Rows>
FK_DEVICE void copy_scattered(Tile<T, kRows, kDim>& tile, const Rows& rows, int first, int end,
                              int dim) {
  using Shape = Tile<T, kRows, kDim>;
  constexpr int kOwn = kRows * 32 / kThreads;  // rows of a warp
  constexpr int kLanes = Shape::kChunks < 32 ? Shape::kChunks : 32, kPass = 32 / kLanes;
  const int lane = static_cast<int>(threadIdx.x % 32), own = lane / kLanes;
  const int warp_row = static_cast<int>(threadIdx.x / 32) * kOwn, left = end - first - warp_row;
  uint64_t found[(kOwn + 31) / 32];
#pragma unroll
  for (int i = 0; i < kOwn; i += 32) {
    const int row = i + lane % kOwn;
    const T* from = row < left ? rows(first + warp_row + row) : rows.data;
    found[i / 32] = reinterpret_cast<uint64_t>(from);
  }
  const int to = Shape::at(warp_row + own, lane % kLanes);
#pragma unroll
  for (int r = 0; r < kOwn; r += kPass) {
    const uint64_t at = __shfl_sync(ptx::kAllLanes, found[r / 32], r % 32 + own);
#pragma unroll
    for (int c = 0; c < Shape::kChunks; c += kLanes) {
      const int column = (lane % kLanes + c) * Shape::kChunkElements;
      const int turned = to ^ Shape::turn(r) * Shape::kChunkElements;
      ptx::copy_async<16>(tile.data + turned + r * kDim + c * Shape::kChunkElements,
                          reinterpret_cast<const T*>(at) + column,
                          r + own < left && column < dim ? 16 : 0);
    }
  }
}

// The same for the tiles of contiguous keys, one after another, by kThreads threads: a thread's
// chunks are a constant step apart, so that each costs one addition of a stride and one comparison.
template <int kThreads, class T, int kRows, int kDim>
class TileCopy {
 public:
  using Shape = Tile<T, kRows, kDim>;

  // The first tile starts at key `first`.
  template <class Keys>
  FK_DEVICE TileCopy(const Keys& keys, int first, int dim)
      : from_(keys.data + (first + row()) * keys.row + column()),
        step_(kStep * keys.row),
        dim_(dim) {}

  // The next tile, which starts at key `first`.
  FK_DEVICE void operator()(Shape& tile, int first, int end) {
    const int to = Shape::at(row(), column() / Shape::kChunkElements), left = end - first - row();
#pragma unroll
    for (int r = 0; r < kRows; r += kStep, from_ = ptx::opaque(from_ + step_)) {
#pragma unroll
      for (int c = 0; c < kWide; ++c) {
        const int right = c * kThreads * Shape::kChunkElements;
        const bool there = r < left && column() < dim_ - right;
        const int turned = to ^ Shape::turn(r) * Shape::kChunkElements;
        ptx::copy_async<16>(tile.data + turned + r * kDim + right, from_ + right, there ? 16 : 0);
      }
    }
  }

 private:
  static constexpr int kWide = Shape::kChunks > kThreads ? Shape::kChunks / kThreads : 1;
  static constexpr int kStep = kThreads * kWide / Shape::kChunks;  // rows of one pass

  FK_DEVICE static int row() {
    return kWide > 1 ? 0 : static_cast<int>(threadIdx.x / Shape::kChunks);
  }
  FK_DEVICE static int column() {
    return static_cast<int>(threadIdx.x % Shape::kChunks) * Shape::kChunkElements;
  }

  const T* from_;
  int64_t step_;
  int dim_;
};

}  // namespace flashkern::attention::sm80
