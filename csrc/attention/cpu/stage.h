// The operands of the matrix kernel's products, as its panels want them: in place where they can be
// multiplied there, else widened, gathered, paired or transposed into a thread's memory.
//
//             float32        pairs              tiles
//   queries   [D][P]         [D / 2][P] pairs   [D / 2][P] pairs     P = kPanel, once for a task
//   keys      [n][D]         [n][D]             [n][D]
//   values    [n][E]         [n / 2][E] pairs   [E][n]
#pragma once

#include "attention/cpu/panel.h"
#include "simd/transpose.h"

namespace flashkern::FK_ISA::attention {

// A panel may begin at any fourth key of a block: what it multiplies ends less than a step behind
// it.
inline constexpr int64_t kStagedColumns = kKeyBlock + kTileDepth;

// Rows [begin, end) of keys or values, to be multiplied: in place, or widened and gathered into
// `staged`.
template <class T>
inline Rows<T> stage_rows(const KeyRows<T>& from, int64_t begin, int64_t end, int64_t dim,
                          float* staged) {
  if constexpr (std::is_same_v<T, Factor<T>>) {
    const auto run = from.run(begin, end);
    if (run.end == end) return {run.rows, from.row};
  }
  auto* out = reinterpret_cast<Factor<T>*>(staged);
  for (int64_t j = begin; j < end;) {
    const auto run = from.run(j, end);
    const T* row = run.rows;
    for (; j < run.end; ++j, row += from.row, out += dim) {
      int64_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) store(out + d, load(row + d));
      if (d < dim) {
        const int tail = static_cast<int>(dim - d);
        store_partial(out + d, load_partial(row + d, tail), tail);
      }
    }
  }
  return {reinterpret_cast<Factor<T>*>(staged), dim};
}

// The same for tiles: copied, and padded with zeros to their depth.
template <class T>
inline Rows<T> stage_tile_rows(const KeyRows<T>& from, int64_t begin, int64_t end, int64_t dim,
                               float* staged) {
  const int64_t depth = padded_depth<T>(dim);
  auto* out = reinterpret_cast<T*>(staged);
  for (int64_t j = begin; j < end;) {
    const auto run = from.run(j, end);
    const T* row = run.rows;
    for (; j < run.end; ++j, row += from.row, out += depth) {
      std::memcpy(out, row, dim * sizeof(T));
      if (depth > dim) std::memset(out + dim, 0, (depth - dim) * sizeof(T));
    }
  }
  return {reinterpret_cast<T*>(staged), depth};
}

// Rows [begin, end) two by two: pair (2j, 2j + 1) of element d is staged[j * dim + d].
template <class T>
inline Rows<T> stage_pairs(const KeyRows<T>& from, int64_t begin, int64_t end, int64_t dim,
                           float* staged) {
  const auto row = [&](int64_t j) { return j < end ? from.run(j, j + 1).rows : nullptr; };
  float* out = staged;
  for (int64_t j = begin; j < end; j += 2, out += dim) join_rows(row(j), row(j + 1), dim, out);
  return {reinterpret_cast<const Factor<T>*>(staged), dim};
}

// Rows [begin, end) as columns: element d of row j is staged[d * row + j], zeros where a step of a
// sum goes on behind the last.
template <class T>
inline Rows<T> stage_columns(const KeyRows<T>& from, int64_t begin, int64_t end, int64_t dim,
                             float* staged) {
  constexpr int64_t kRow = kStagedColumns / 2;  // pairs
  const int64_t n = round_up(end - begin, kTileDepth);
  for (int64_t j = 0; j < n; j += kTileDepth) {
    const T* rows[kTileDepth];
    for (int i = 0; i < kTileDepth; ++i) {
      const int64_t key = begin + j + i;
      rows[i] = key < end ? from.at(key) : nullptr;
    }
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int width = static_cast<int>(dim - d < kLanes ? dim - d : kLanes);
      const auto part = [&](const T* row) {
        if (row == nullptr) return VecF{};
        return width == kLanes ? load(row + d) : load_partial(row + d, width);
      };
      VecF x[kLanes];
      unrolled<kLanes>([&](auto i) __attribute__((always_inline)) {
        x[i] = join(part(rows[2 * i]), part(rows[2 * i + 1]));
      });
      transpose(x);
      float* to = staged + d * kRow + j / 2;
      unrolled<kLanes>([&](auto i) __attribute__((always_inline)) { store(to + i * kRow, x[i]); });
    }
  }
  for (int64_t d = 0; d < round_up(dim, kLanes); ++d) {
    store(staged + d * kRow + n / 2, VecF{});
  }
  return {reinterpret_cast<const T*>(staged), kStagedColumns};
}

// What the two hold, in floats.
template <class T>
inline int64_t staged_keys(int64_t dim) {
  return kInTiles<T> ? (kKeyBlock + kTileSide) * padded_depth<T>(dim) / 2 : kKeyBlock * dim;
}
template <class T>
inline int64_t staged_values(int64_t dim) {
  return kInTiles<T> ? round_up(dim, kLanes) * kStagedColumns / 2 : kKeyBlock * dim;
}

template <class T>
inline Rows<T> stage_keys(const KeyRows<T>& from, int64_t begin, int64_t end, int64_t dim,
                          float* staged) {
  if constexpr (kInTiles<T>) return stage_tile_rows(from, begin, end, dim, staged);
  return stage_rows(from, begin, end, dim, staged);
}
template <class T>
inline Rows<T> stage_values(const KeyRows<T>& from, int64_t begin, int64_t end, int64_t dim,
                            float* staged) {
  if constexpr (kInTiles<T>) {
    return stage_columns(from, begin, end, dim, staged);
  } else if constexpr (kInPairs<T>) {
    return stage_pairs(from, begin, end, dim, staged);
  } else {
    return stage_rows(from, begin, end, dim, staged);
  }
}

// Queries of one panel, transposed to [padded head_dim / kStep][kPanel].
template <class T>
inline void pack_queries(const HeadView& view, const PanelRows& rows, float factor, float* out) {
  const Problem& p = *view.problem;
  for (int v = 0; v < kPanel; v += kLanes) {
    const auto row = [&](int lane) {
      const T* at = query_row<T>(p.query, view, rows.batch[v + lane], rows.head[v + lane],
                                 rows.query[v + lane]);
      if constexpr (kInPairs<T>) {
        return reinterpret_cast<const BFloat16Pair*>(at);
      } else {
        return at;
      }
    };
    transpose_rows(row, kLanes, p.head_dim / kStep<T>, factor, out + v, kPanel);
  }
  for (int64_t d = p.head_dim; d < padded_depth<T>(p.head_dim); d += kStep<T>) {
    std::memset(out + d / kStep<T> * kPanel, 0, kPanel * sizeof(float));
  }
}

}  // namespace flashkern::FK_ISA::attention
