// The working memory of a backward task, and the arithmetic on one tile of rows x keys.
#pragma once

#include <algorithm>

#include "attention/cpu/product.h"
#include "attention/cpu/scores.h"
#include "attention/cpu/scratch.h"
#include "simd/transpose.h"

namespace flashkern::FK_ISA::attention {

// A tile's rows and keys are multiples of the micro-GEMM's own, so that no product has a remainder:
// 96 = 16 * kGemmRows = 6 * kGemmCols on AVX2, 224 = 16 * kGemmRows = 7 * kGemmCols on AVX-512.
// Keys are also a multiple of 4, as a dropout counter wants. Up to 128 features, what a task holds
// fits an L2 of 512 KiB (AVX2) or 1 MiB (AVX-512).
// With AMX they are multiples of a step of its sums.
inline constexpr int64_t kTileRows = kMultipliesTiles ? 64 : kLanes == 16 ? 56 : 96;
inline constexpr int64_t kTileKeys = kMultipliesTiles ? 256 : kLanes == 16 ? 224 : 96;
inline constexpr int64_t kWideTileKeys = kTileKeys / 2;  // for more than 128 features
// The grain at which a diagonal is followed.
inline constexpr int64_t kMaskedRows = kMultipliesTiles ? kTileDepth : 2 * kGemmRows;

inline int64_t tile_keys(const Problem& p) {
  return std::max(p.head_dim, p.value_dim) > 128 ? kWideTileKeys : kTileKeys;
}

// Rows of a tile lie an odd number of cache lines apart: a column then visits every set of L1.
inline int64_t spread_row(int64_t n) { return ((n + 15) / 16 | 1) * 16; }
inline int64_t pad_columns(int64_t n) {
  constexpr int64_t kUnit = kMultipliesTiles ? kTileDepth : kLanes;
  return (n + kUnit - 1) / kUnit * kUnit;
}

struct TileShape {
  int64_t keys, head_depth, value_depth, head_row, value_row, score_row;

  explicit TileShape(const Problem& p)
      : keys(tile_keys(p)),
        head_depth(padded_depth<BFloat16>(p.head_dim)),
        value_depth(padded_depth<BFloat16>(p.value_dim)),
        head_row(spread_row(p.head_dim)),
        value_row(spread_row(p.value_dim)),
        score_row(spread_row(keys)) {}

  int64_t floats() const {
    return score_row * (head_depth + value_depth) + keys * (2 * head_row + value_row) +
           kTileRows * (head_row + value_row + 2 * score_row) + kTileRows * score_row / 2 +
           5 * score_row + 2 * kTileRows +
           kMultipliesTiles * kTileRows * (keys + (head_depth + value_depth) / 2 + head_row);
  }
};

// Everything in float32, whatever the tensors hold. With kInPairs what is multiplied is bfloat16:
// the operands marked * are lanes of pairs in half as many rows, of K and Q without a factor.
struct Tiles : TileShape {
  float *keys_t, *values_t;        // * [head_dim][keys], [value_dim][keys]: factor * K^T, V^T
  float* keys_scaled;              // * [keys][head_dim]: scale * K
  float *grad_keys, *grad_values;  // [keys][...]: the accumulators
  float *query, *grad;             // * [rows][...]: Q and dO
  float *scores, *grad_scores;     // [rows][keys]: S, then dropped P *; dP, then dS *
  BFloat16* grad_rows;             // [rows][keys]: dS in bfloat16, for kInPairs alone
  // For tiles alone: left sides of products, in bfloat16, and a product that is not yet scaled.
  BFloat16 *query_left, *grad_left;    // [rows][head_dim], [rows][value_dim]: Q, dO
  BFloat16 *scores_left, *grads_left;  // [keys][rows]: dropped P^T, dS^T
  float* query_product;                // [rows][head_dim]
  float* addend;                       // [keys]: one row of bias and ALiBi
  uint32_t* words;                     // [keys]: one row of random words
  float *lse, *delta;                  // [rows]

  Tiles(const Problem& p, Scratch& scratch) : TileShape(p) {
    scratch.reset(floats());
    keys_t = scratch.take(head_depth * score_row);
    values_t = scratch.take(value_depth * score_row);
    keys_scaled = scratch.take(keys * head_row);
    grad_keys = scratch.take(keys * head_row);
    grad_values = scratch.take(keys * value_row);
    query = scratch.take(kTileRows * head_row);
    grad = scratch.take(kTileRows * value_row);
    scores = scratch.take(kTileRows * score_row);
    grad_scores = scratch.take(kTileRows * score_row);
    grad_rows = reinterpret_cast<BFloat16*>(scratch.take(kTileRows * score_row / 2));
    addend = scratch.take(score_row);
    words = reinterpret_cast<uint32_t*>(scratch.take(4 * score_row));
    lse = scratch.take(kTileRows);
    delta = scratch.take(kTileRows);
    if constexpr (kMultipliesTiles) {
      const auto left = [&](int64_t n) {
        return reinterpret_cast<BFloat16*>(scratch.take(kTileRows * n / 2));
      };
      query_left = left(head_depth);
      grad_left = left(value_depth);
      scores_left = left(keys);
      grads_left = left(keys);
      query_product = scratch.take(kTileRows * head_row);
    }
  }
};

template <class T>
inline void widen_rows(const T* from, int64_t from_row, int64_t rows, int64_t n, float* to,
                       int64_t to_row, float factor = 1.f) {
  for (int64_t i = 0; i < rows; ++i, from += from_row, to += to_row) {
    int64_t d = 0;
    for (; d + kLanes <= n; d += kLanes) store(to + d, load(from + d) * factor);
    if (d < n) store(to + d, load_partial(from + d, n - d) * factor);  // rows are padded to 16
  }
}

// Rows two by two: to[i][d] = the pair (from[2i][d], from[2i + 1][d]), zeros for a missing row, and
// for tiles up to a whole step of their sum.
inline void pair_up(const BFloat16* from, int64_t from_row, int64_t rows, int64_t n, float* to,
                    int64_t to_row) {
  int64_t i = 0;
  for (; i < rows; i += 2, from += 2 * from_row, to += to_row) {
    join_rows(from, i + 1 < rows ? from + from_row : nullptr, n, to);
  }
  for (; i < padded_depth<BFloat16>(rows); i += 2, to += to_row)
    std::memset(to, 0, n * sizeof(float));
}

// The same of a tile of floats, in place.
inline void round_up_pairs(float* s, int64_t row, int64_t rows, int64_t n) {
  for (int64_t i = 0; i < rows; i += 2) {
    const float* from = s + i * row;
    float* to = s + i / 2 * row;
    for (int64_t v = 0; v < n; v += kLanes) {
      const VecF second = i + 1 < rows ? load(from + row + v) : VecF{};
      store(to + v, round_to_pairs(load(from + v), second));
    }
  }
}

inline void round_tile(const float* from, int64_t row, int64_t rows, int64_t n, BFloat16* to) {
  for (int64_t i = 0; i < rows; ++i, from += row, to += row) {
    for (int64_t v = 0; v < n; v += 2 * kLanes) {
      store_rounded(to + v, load(from + v), load(from + v + kLanes));
    }
  }
}

// to[v][i] = from[i][v], in bfloat16: rows of kTileRows, zeros behind the last of `rows` up to a
// whole step of a sum.
inline void round_columns(const float* from, int64_t row, int64_t rows, int64_t n, BFloat16* to) {
  for (int64_t i = 0; i < rows; i += kTileDepth) {
    for (int64_t v = 0; v < n; v += kLanes) {
      VecF x[2][kLanes] = {};
      for (int half = 0; half < 2; ++half) {
        const int64_t first = i + half * kLanes;
        unrolled<kLanes>([&](auto l) __attribute__((always_inline)) {
          if (first + l < rows) x[half][l] = load(from + (first + l) * row + v);
        });
        transpose(x[half]);
      }
      unrolled<kLanes>([&](auto l) __attribute__((always_inline)) {
        store_rounded(to + (v + l) * kTileRows + i, x[0][l], x[1][l]);
      });
    }
  }
}

// Rows for the left side of a product of tiles: whole steps of the sum, zeros where there is
// nothing.
inline void copy_left(const BFloat16* from, int64_t from_row, int64_t rows, int64_t n,
                      BFloat16* to) {
  const int64_t depth = padded_depth<BFloat16>(n);
  for (int64_t i = 0; i < rows; ++i, from += from_row, to += depth) {
    std::memcpy(to, from, n * sizeof *to);
    if (depth > n) std::memset(static_cast<void*>(to + n), 0, (depth - n) * sizeof *to);
  }
}

template <class T>
inline void round_rows(const float* from, int64_t from_row, int64_t rows, int64_t n, T* to,
                       int64_t to_row, float factor = 1.f) {
  for (int64_t i = 0; i < rows; ++i, from += from_row, to += to_row) {
    int64_t d = 0;
    for (; d + kLanes <= n; d += kLanes) store(to + d, load(from + d) * factor);
    if (d < n) store_partial(to + d, load(from + d) * factor, n - d);
  }
}

// to[d][j] = factor * from[j][d] for j < rows, and 0 up to pad_columns(rows): what is
// computed from those columns is thrown away, and must not be NaN.
template <class T>
inline void transpose_tile(const T* from, int64_t from_row, int64_t rows, int64_t n, float* to,
                           int64_t to_row, float factor) {
  using Element = std::conditional_t<kInPairs<T>, BFloat16Pair, T>;
  for (int64_t j = 0; j < pad_columns(rows); j += kLanes) {
    const auto row = [&](int64_t lane) {
      return reinterpret_cast<const Element*>(from + (j + lane) * from_row);
    };
    transpose_rows(row, rows - j, n / kStep<T>, factor, to + j, to_row);
    for (int64_t d = n; d < padded_depth<T>(n); d += kStep<T>) {
      store(to + d / kStep<T> * to_row + j, VecF{});
    }
  }
}

// ---- one row of a tile ----

// Columns of one row. [begin, end) were computed, and of them the row sees [first, last).
struct RowSpan {
  int64_t begin, end, first, last, columns;
};

// What the general path needs beside lse and delta.
struct RowExtras {
  float unit = 1;                   // of the scores
  const float* addend = nullptr;    // bias and ALiBi, in units of log2
  const uint32_t* words = nullptr;  // dropout
  uint64_t threshold = 0;
  float keep = 1;
  float softcap = 0;           // in units of log2; 0: none
  float* grad_bias = nullptr;  // + grad_bias_step * column
  int64_t grad_bias_step = 0;
};

inline VecI lanes_from(int64_t first) {
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane + static_cast<int32_t>(first);
}

// Zero outside what was computed: the products over rows read whole columns.
inline void clear_outside(float* s, float* g, const RowSpan& span) {
  for (int64_t v = 0; v < span.begin; v += kLanes) store(s + v, VecF{}), store(g + v, VecF{});
  for (int64_t v = span.end; v < span.columns; v += kLanes)
    store(s + v, VecF{}), store(g + v, VecF{});
}

// Beyond 2^24 a rounded log-sum-exp may lie far below a logit: P stays finite. NaN stays NaN.
inline VecF probability(VecF x) { return exp2_below_zero(min(broadcast(1.f), x)); }

// P = 2^(unit S - lse), dS = P (dP - delta), in place.
template <bool kMasked>
inline void plain_row(float* s, float* g, float unit, float lse, float delta, const RowSpan& span) {
  for (int64_t v = span.begin; v < span.end; v += kLanes) {
    VecF p = probability(fma(load(s + v), broadcast(unit), broadcast(-lse)));
    if constexpr (kMasked) {
      const VecI lane = lanes_from(v);
      const VecI seen =
          (lane >= static_cast<int32_t>(span.first)) & (lane < static_cast<int32_t>(span.last));
      p = seen ? p : VecF{};
    }
    store(s + v, p);
    store(g + v, p * (load(g + v) - delta));
  }
}

inline void add_bias_gradient(const RowExtras& x, int64_t v, VecF ds, int64_t last) {
  if (x.grad_bias_step == 0) {
    *x.grad_bias += reduce_add(ds);
    return;
  }
  float* at = x.grad_bias + v;
  const int n = static_cast<int>(std::min<int64_t>(kLanes, last - v));
  if (n == kLanes) {
    store(at, load(at) + ds);
  } else if (n > 0) {
    store_partial(at, load_partial(at, n) + ds, n);
  }
}

inline void general_row(float* s, float* g, float lse, float delta, const RowSpan& span,
                        const RowExtras& extras) {
  for (int64_t v = span.begin; v < span.end; v += kLanes) {
    VecF x = load(s + v) * extras.unit, slope = broadcast(1.f);
    if (extras.softcap > 0) {
      const VecF t = tanh(x);
      slope = 1.f - t * t;
      x = t * extras.softcap;
    }
    if (extras.addend != nullptr) x += load(extras.addend + v);
    const VecI lane = lanes_from(v);
    const VecI seen =
        (lane >= static_cast<int32_t>(span.first)) & (lane < static_cast<int32_t>(span.last));
    const VecF p = seen ? probability(x - lse) : VecF{};
    VecF kept = p, dp = load(g + v);
    if (extras.words != nullptr) {
      VecU word;
      std::memcpy(&word, extras.words + v, sizeof word);
      kept = keep(word, extras.threshold, p) * extras.keep;
      dp = keep(word, extras.threshold, dp) * extras.keep;
    }
    const VecF ds = p * (dp - delta);
    if (extras.grad_bias != nullptr) add_bias_gradient(extras, v, ds, span.last);
    store(s + v, kept);
    store(g + v, ds * slope);
  }
}

}  // namespace flashkern::FK_ISA::attention
