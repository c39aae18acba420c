// How the warps of a backward block share its products, its shared memory, and how packed rows get
// there.
#pragma once

#include <type_traits>

#include "attention/sm80/backward_plan.h"
#include "attention/sm80/gradient.h"
#include "attention/sm80/tile.h"

namespace flashkern::attention::sm80 {

// Numbers of keys, rows and columns are a warp's own where their names say "Of" or "Columns".
template <class T, int kDim, bool kFull>
struct BackwardShape {
  static constexpr BackwardTile kTile = backward_tile(kDim, sizeof(T), kFull);
  static constexpr int kKeys = kTile.keys, kRows = kTile.rows, kWarps = kTile.warps;
  static constexpr int kStages = kTile.stages;

  static constexpr int kScoreKeys = kTile.score_keys, kScoreRows = kTile.score_rows;
  static constexpr int kKeyParts = kKeys / kScoreKeys, kRowParts = kWarps / kKeyParts;
  // A warp has all scores of its keys: they are the factors of its dK and dV as they stand.
  static constexpr bool kHeld = kRowParts == 1;

  static constexpr int kOfKeys = kKeys < 32 ? kKeys : 32;  // keys of a warp in dK and dV
  static constexpr int kKeyColumns = kDim * (kKeys / kOfKeys) / kWarps;
  static constexpr int kOfRows = kRows < 32 ? kRows : 32;  // rows of a warp in dQ
  static constexpr int kRowColumns = kDim * (kRows / kOfRows) / kWarps;
  static_assert(!kHeld || (kOfKeys == kScoreKeys && kKeyColumns == kDim));
};

struct Nothing {};
template <class T, int kKeys, int kRows>
struct Weights {
  Tile<T, kKeys, kRows> weights;  // P^T
};

template <class T, int kDim, bool kFull, class Shape = BackwardShape<T, kDim, kFull>>
struct BackwardStorage
    : std::conditional_t<Shape::kHeld, Nothing, Weights<T, Shape::kKeys, Shape::kRows>> {
  Tile<T, Shape::kKeys, kDim> keys, values;
  Tile<T, Shape::kRows, kDim> queries[Shape::kStages], grads[Shape::kStages];
  alignas(16) RowNumbers rows[Shape::kStages][Shape::kRows];
  union {
    Tile<T, Shape::kKeys, Shape::kRows> logits;  // dS^T
    int ticket;                                  // before the first tile
  };
};

// Rows of a packed tile that one pass of all threads copies.
template <class Tile>
FK_DEVICE constexpr int pass_rows(int threads) {
  return threads / Tile::kChunks;
}

// Packed rows from `start` on, `rows` of them and zeros after those, by kThreads. `queries`: what
// pass_rows are in queries, where that is a whole number and rows are aligned, else 0: a thread's
// places are then as far apart as that.
template <int kThreads, class T, int kRows, int kDim>
FK_DEVICE void copy_packed(Tile<T, kRows, kDim>& to, const T* from, const Matrix& m, int dim,
                           int rows, Place start, const Group& group, int queries, bool aligned) {
  using Shape = Tile<T, kRows, kDim>;
  constexpr int kStep = pass_rows<Shape>(kThreads), kWide = Shape::kChunkElements;
  const int first = static_cast<int>(threadIdx.x) / Shape::kChunks;
  const int chunk = static_cast<int>(threadIdx.x) % Shape::kChunks;
  if (chunk * kWide >= dim) rows = 0;
  from += chunk * kWide;
  if (kRows / kStep <= 8 && queries > 0) {  // more places would crowd the registers
    from += start.after(first, group).at(m);
    const int64_t step = queries * m.row;
#pragma unroll
    for (int i = 0; i < kRows; i += kStep, from += step) {
      ptx::copy_async<16>(to.chunk(first + i, chunk), from, first + i < rows ? 16 : 0);
    }
    return;
  }
#pragma unroll 1
  for (int r = first; r < kRows; r += kStep) {
    const T* row = from + (r < rows ? start.after(r, group).at(m) : 0);
    if (aligned) {
      ptx::copy_async<16>(to.chunk(r, chunk), row, r < rows ? 16 : 0);
    } else {
      copy_slowly(to.chunk(r, chunk), row, r < rows ? kWide : 0);
    }
  }
}

}  // namespace flashkern::attention::sm80
