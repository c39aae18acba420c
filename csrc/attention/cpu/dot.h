// The two products of the decode kernel. Keys and values come straight from the cache, are widened
// in registers and used for every query row: memory traffic, not arithmetic, sets the pace.
//
//   scores[r][j] = sum_d q[r][d] keys[j][d]      2 x 4 or 4 x 2 dot products in registers
//   out[r][e]   += sum_j p[r][j] values[j][e]    the weights of 4 keys in registers, out in L1
//
// Both walk four rows of the cache at a time from left to right, and ask for rows some KiB further
// on as they go: order and spread are what lets the loads of one core fill its share of the memory
// bus. Whole rows first and a burst of prefetches between them reach half of it.
#pragma once

#include "simd/dot.h"

namespace flashkern::FK_ISA::attention {

// step(d, load) for every vector of a row of `dim` elements (a multiple of 8), the last one maybe
// in part. Not unrolled: each load instruction then walks line by line, a stride that the
// hardware's prefetcher follows.
template <class T, class Step>
__attribute__((always_inline)) inline void along_row(int64_t dim, Step&& step) {
  const auto whole = [](const T* at) __attribute__((always_inline)) { return load(at); };
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) step(d, whole);
  if (kLanes > 8 && d < dim) {
    const int tail = static_cast<int>(dim - d);
    step(d, [tail](const T* at) __attribute__((always_inline)) { return load_partial(at, tail); });
  }
}

// kRows rows of scores for kKeys (at most 4) keys. `q` rows are padded with zeros to whole vectors.
template <class T, int kRows, int kKeys>
inline void dot_tile(const float* q, int64_t q_row, const T* keys, int64_t key_row, int64_t dim,
                     float* scores, int64_t score_row) {
  VecF acc[kRows][4];
  unrolled<kRows * 4>([&](auto t) __attribute__((always_inline)) { acc[t / 4][t % 4] = VecF{}; });
  const auto step = [&](int64_t d, auto load_key) __attribute__((always_inline)) {
    VecF query[kRows];
    unrolled<kRows>([&](auto r)
                        __attribute__((always_inline)) { query[r] = load(q + r * q_row + d); });
    unrolled<kKeys>([&](auto j) __attribute__((always_inline)) {
      const VecF key = load_key(keys + j * key_row + d);
      unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
        acc[r][j] = fma(query[r], key, acc[r][j]);
      });
    });
  };
  along_row<T>(dim, step);
  unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
    const Vec4 sums = sum_lanes(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
    std::memcpy(scores + r * score_row, &sums, kKeys * sizeof(float));
  });
}

// The same with 4 rows x 2 keys: a key is widened once for four rows.
template <class T>
inline void dot_square(const float* q, int64_t q_row, const T* keys, int64_t key_row, int64_t dim,
                       float* scores, int64_t score_row) {
  VecF acc[4][2];
  unrolled<8>([&](auto t) __attribute__((always_inline)) { acc[t / 2][t % 2] = VecF{}; });
  const auto step = [&](int64_t d, auto load_key) __attribute__((always_inline)) {
    const VecF key[2] = {load_key(keys + d), load_key(keys + key_row + d)};
    unrolled<4>([&](auto r) __attribute__((always_inline)) {
      const VecF query = load(q + r * q_row + d);
      acc[r][0] = fma(query, key[0], acc[r][0]);
      acc[r][1] = fma(query, key[1], acc[r][1]);
    });
  };
  along_row<T>(dim, step);
  unrolled<2>([&](auto pair) __attribute__((always_inline)) {
    constexpr int r = 2 * pair;
    const Vec4 sums = sum_lanes(acc[r][0], acc[r][1], acc[r + 1][0], acc[r + 1][1]);
    std::memcpy(scores + r * score_row, &sums, 8);
    std::memcpy(scores + (r + 1) * score_row, reinterpret_cast<const char*>(&sums) + 8, 8);
  });
}

// Four keys meet all query rows before the next four are read.
template <class T>
inline void dot_scores(int64_t rows, const float* q, int64_t q_row, const T* keys, int64_t key_row,
                       int64_t count, int64_t dim, float* scores, int64_t score_row) {
  for (; count >= 4; count -= 4, keys += 4 * key_row, scores += 4) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      const float* queries = q + r * q_row;
      float* out = scores + r * score_row;
      dot_square(queries, q_row, keys, key_row, dim, out, score_row);
      dot_square(queries, q_row, keys + 2 * key_row, key_row, dim, out + 2, score_row);
    }
    for (; r + 2 <= rows; r += 2) {
      dot_tile<T, 2, 4>(q + r * q_row, q_row, keys, key_row, dim, scores + r * score_row,
                        score_row);
    }
    if (r < rows) {
      dot_tile<T, 1, 4>(q + r * q_row, q_row, keys, key_row, dim, scores + r * score_row,
                        score_row);
    }
  }
  for (; count > 0; --count, keys += key_row, ++scores) {
    for (int64_t r = 0; r < rows; ++r) {
      dot_tile<T, 1, 1>(q + r * q_row, q_row, keys, key_row, dim, scores + r * score_row,
                        score_row);
    }
  }
}

// Asks for `count` rows ahead of their use. Addresses are numbers: they may lie past an array's
// end.
template <class T>
inline void prefetch_rows(const T* rows, int64_t row, int64_t count, int64_t dim) {
  const uintptr_t step = row * sizeof(T), bytes = dim * sizeof(T);
  uintptr_t line = reinterpret_cast<uintptr_t>(rows);
  for (int64_t j = 0; j < count; ++j, line += step) {
    for (uintptr_t byte = 0; byte < bytes; byte += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(line + byte));
    }
  }
}

// Rows of out that share the weights of kKeys keys: these fill up to half of the registers.
inline constexpr int kWeighRows = kLanes == 16 ? 4 : 2;

template <class T, int kRows, int kKeys>
inline void weigh_keys(const float* p, int64_t p_row, const T* values, int64_t value_row,
                       int64_t dim, float* out, int64_t out_row) {
  VecF weight[kRows][kKeys];
  unrolled<kRows * kKeys>([&](auto t) __attribute__((always_inline)) {
    weight[t / kKeys][t % kKeys] = broadcast(p[t / kKeys * p_row + t % kKeys]);
  });
  const auto step = [&](int64_t e, auto load_value) __attribute__((always_inline)) {
    VecF value[kKeys];
    unrolled<kKeys>([&](auto j) __attribute__((always_inline)) {
      value[j] = load_value(values + j * value_row + e);
    });
    unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
      float* at = out + r * out_row + e;
      VecF sum = load(at);
      unrolled<kKeys>(
          [&](auto j) __attribute__((always_inline)) { sum = fma(weight[r][j], value[j], sum); });
      store(at, sum);
    });
  };
  along_row<T>(dim, step);
}

template <class T, int kKeys>
inline void weigh_rows(int64_t rows, const float* p, int64_t p_row, const T* values,
                       int64_t value_row, int64_t dim, float* out, int64_t out_row) {
  constexpr int kRows = kWeighRows;
  for (; rows >= kRows; rows -= kRows, p += kRows * p_row, out += kRows * out_row) {
    weigh_keys<T, kRows, kKeys>(p, p_row, values, value_row, dim, out, out_row);
  }
  for (; rows > 0; --rows, p += p_row, out += out_row) {
    weigh_keys<T, 1, kKeys>(p, p_row, values, value_row, dim, out, out_row);
  }
}

// `out` rows are padded to whole vectors.
template <class T>
inline void weigh_values(int64_t rows, const float* p, int64_t p_row, const T* values,
                         int64_t value_row, int64_t count, int64_t dim, float* out,
                         int64_t out_row) {
  for (; count >= 4; count -= 4, p += 4, values += 4 * value_row) {
    weigh_rows<T, 4>(rows, p, p_row, values, value_row, dim, out, out_row);
  }
  for (; count > 0; --count, ++p, values += value_row) {
    weigh_rows<T, 1>(rows, p, p_row, values, value_row, dim, out, out_row);
  }
}

}  // namespace flashkern::FK_ISA::attention
