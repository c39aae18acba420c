// Who the query rows of a panel are. The heads of a group share keys and values, so their rows are
// packed together, query by query: row r of a KV head is query r / group of head kv_head * group +
// r % group. Neighbours then lie on the same diagonal, and one read of a key serves the whole
// group. Where beams share the keys of a prompt their rows are packed too: query by query, beam by
// beam, head by head.
#pragma once

#include "attention/mask.h"
#include "attention/params.h"
#include "simd/gemm.h"
#include "simd/tile_gemm.h"

namespace flashkern::FK_ISA::attention {

using namespace flashkern::attention;

inline constexpr int kPanel = kGemmCols;  // query rows in the lanes of two vectors

// What the matrix kernels multiply: float32, or bfloat16 tensors in pairs along the sum where the
// ISA multiplies those. Then kStep terms make one step of a product, and K and Q enter unscaled.
template <class T>
using Factor = std::conditional_t<kMultipliesPairs && std::is_same_v<T, BFloat16>, BFloat16, float>;
template <class T>
inline constexpr bool kInPairs = !std::is_same_v<Factor<T>, float>;
template <class T>
inline constexpr int64_t kStep = kInPairs<T> ? 2 : 1;

// With AMX pairs are multiplied by tiles: operands are padded with zeros to whole steps of a sum.
template <class T>
inline constexpr bool kInTiles = kMultipliesTiles && kInPairs<T>;
template <class T>
inline constexpr int64_t padded_depth(int64_t n) {
  return kInTiles<T> ? (n + kTileDepth - 1) / kTileDepth * kTileDepth : n;
}

// One KV head of one sequence.
struct HeadView {
  const Problem* problem;
  Sequence sequence;
  Band band;
  int64_t kv_head, group, beams, packed;

  HeadView(const Problem& p, const Sequence& s, int64_t kv_head)
      : problem(&p),
        sequence(s),
        band(p, s),
        kv_head(kv_head),
        group(p.group()),
        beams(p.row_beams),
        packed(p.packed_rows()) {}

  int64_t query_of(int64_t row) const { return row / packed; }
  int64_t head_of(int64_t row) const { return kv_head * group + row % group; }
  int64_t beam_of(int64_t row) const { return row / group % beams; }
  // Of queries and outputs; keys have the sequence's.
  int64_t batch_of(int64_t row) const { return sequence.batch * beams + beam_of(row); }
};

// A query row, or one of the output.
template <class T>
inline const T* query_row(const Matrix& m, const HeadView& view, int64_t batch, int64_t head,
                          int64_t query) {
  return static_cast<const T*>(m.data) + batch * m.batch + head * m.head +
         (view.sequence.q_start + query) * m.row;
}

template <class T>
inline const T* row_of(const Matrix& m, const Sequence& s, int64_t start, int64_t head,
                       int64_t row) {
  return static_cast<const T*>(m.data) + s.batch * m.batch + head * m.head + (start + row) * m.row;
}
template <class T>
inline T* row_of(const Output& m, const Sequence& s, int64_t head, int64_t row) {
  return static_cast<T*>(m.data) + s.batch * m.batch + head * m.head + (s.q_start + row) * m.row;
}

// The keys (or values) of one KV head, contiguous or in pages; in beam search each of them in the
// row of the batch that the beam table names.
template <class T>
struct KeyRows {
  const T* data;
  int64_t row;
  const int32_t* pages = nullptr;
  int64_t page_stride = 0, page_size = 0;
  const int32_t* beams = nullptr;
  int64_t beam_stride = 0;  // of the data, or of the page table

  KeyRows(const Problem& p, const Matrix& m, const HeadView& head)
      : data(static_cast<const T*>(m.data) + head.kv_head * m.head), row(m.row) {
    int64_t batch = head.sequence.batch;
    if (p.beam_table != nullptr) {
      beams = p.beam_table + batch * p.beam_table_row;
      beam_stride = p.page_table != nullptr ? p.page_table_row : m.batch;
      batch = batch / p.beams * p.beams;
    }
    if (p.page_table != nullptr) {
      pages = p.page_table + batch * p.page_table_row;
      page_stride = m.batch;
      page_size = p.page_size;
    } else {
      data += batch * m.batch + head.sequence.k_start * m.row;
    }
  }

  const T* at(int64_t j) const {
    const int64_t moved = beams == nullptr ? 0 : beams[j] * beam_stride;
    if (pages == nullptr) return data + moved + j * row;
    return data + pages[moved + j / page_size] * page_stride + j % page_size * row;
  }

  // The rows from key j on that lie one `row` apart: where they start, and where they end.
  struct Run {
    const T* rows;
    int64_t end;
  };
  Run run(int64_t j, int64_t end) const {
    if (pages != nullptr) {
      const int64_t page_end = (j / page_size + 1) * page_size;
      end = end < page_end ? end : page_end;
    }
    if (beams != nullptr) {
      int64_t next = j + 1;
      while (next < end && beams[next] == beams[j]) ++next;
      end = next;
    }
    return {at(j), end};
  }
};

// out[d] = the pair (a[d], b[d]); b may be missing, for zeros.
inline void join_rows(const BFloat16* a, const BFloat16* b, int64_t n, float* out) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) {
    store(out + d, join(load(a + d), b == nullptr ? VecF{} : load(b + d)));
  }
  if (d == n) return;
  const int tail = static_cast<int>(n - d);
  const VecF second = b == nullptr ? VecF{} : load_partial(b + d, tail);
  store_partial(out + d, join(load_partial(a + d, tail), second), tail);
}

// The lanes of one panel. Lanes past the last row repeat it: they are computed and thrown away.
struct PanelRows {
  int count = 0;
  int64_t first_query = 0, last_query = 0;
  alignas(64) int32_t query[kPanel];
  alignas(64) int32_t head[kPanel];
  alignas(64) int32_t batch[kPanel];
  alignas(64) int32_t first_key[kPanel];
  alignas(64) int32_t end_key[kPanel];

  void set(const HeadView& view, int64_t begin, int64_t end) {
    count = static_cast<int>(end - begin < kPanel ? end - begin : kPanel);
    first_query = view.query_of(begin);
    last_query = view.query_of(begin + count - 1);
    for (int lane = 0; lane < kPanel; ++lane) {
      const int64_t row = begin + (lane < count ? lane : count - 1);
      const int64_t i = view.query_of(row);
      query[lane] = static_cast<int32_t>(i);
      head[lane] = static_cast<int32_t>(view.head_of(row));
      batch[lane] = static_cast<int32_t>(view.batch_of(row));
      first_key[lane] = static_cast<int32_t>(view.band.first_key(i));
      end_key[lane] = static_cast<int32_t>(view.band.end_key(i));
    }
  }
};

}  // namespace flashkern::FK_ISA::attention
