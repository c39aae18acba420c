// The two products of the decode kernel. Keys and values come straight from the cache, are widened
// in registers and used for every query row: memory traffic, not arithmetic, sets the pace.
//
//   scores[r][j] = sum_d q[r][d] keys[j][d]      2 x 4 or 4 x 2 dot products in registers
//   out[r][e]   += sum_j p[r][j] values[j][e]    8 to 10 vectors of out in registers
#pragma once

#include "simd/vec.h"

namespace flashkern::FK_ISA::attention {

using Vec4 = float __attribute__((vector_size(16)));

inline Vec4 quarter(VecF x, int i) {
  Vec4 part;
  std::memcpy(&part, reinterpret_cast<const char*>(&x) + 16 * i, 16);
  return part;
}

// a0 + a1, a2 + a3, b0 + b1, b2 + b3. (GCC 11 has __builtin_shuffle only.)
inline Vec4 sum_neighbours(Vec4 a, Vec4 b) {
  using Lanes = int32_t __attribute__((vector_size(16)));
  return __builtin_shuffle(a, b, Lanes{0, 2, 4, 6}) + __builtin_shuffle(a, b, Lanes{1, 3, 5, 7});
}

// The sums of four vectors, side by side.
inline Vec4 sum_lanes(VecF a, VecF b, VecF c, VecF d) {
  Vec4 x[4] = {quarter(a, 0), quarter(b, 0), quarter(c, 0), quarter(d, 0)};
  for (int i = 1; i < kLanes / 4; ++i) {
    x[0] += quarter(a, i);
    x[1] += quarter(b, i);
    x[2] += quarter(c, i);
    x[3] += quarter(d, i);
  }
  const Vec4 ab = sum_neighbours(x[0], x[1]), cd = sum_neighbours(x[2], x[3]);
  return sum_neighbours(ab, cd);
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
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) step(d, [](const T* key) { return load(key); });
  if (kLanes > 8 && d < dim) {
    const int tail = static_cast<int>(dim - d);
    step(d, [tail](const T* key) { return load_partial(key, tail); });
  }
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
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) step(d, [](const T* key) { return load(key); });
  if (kLanes > 8 && d < dim) {
    const int tail = static_cast<int>(dim - d);
    step(d, [tail](const T* key) { return load_partial(key, tail); });
  }
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

// Asks for `count` rows of values ahead of their use.
template <class T>
inline void prefetch_rows(const T* rows, int64_t row, int64_t count, int64_t dim) {
  for (int64_t j = 0; j < count; ++j) {
    const char* line = reinterpret_cast<const char*>(rows + j * row);
    for (int64_t byte = 0; byte < dim * static_cast<int64_t>(sizeof(T)); byte += 64) {
      __builtin_prefetch(line + byte);
    }
  }
}

// kRows x kVecs vectors of out, over `count` keys.
template <class T, int kRows, int kVecs>
inline void weigh_tile(const float* p, int64_t p_row, const T* values, int64_t value_row,
                       int64_t count, float* out, int64_t out_row) {
  VecF acc[kRows][kVecs];
  unrolled<kRows * kVecs>([&](auto t) __attribute__((always_inline)) {
    acc[t / kVecs][t % kVecs] = load(out + t / kVecs * out_row + t % kVecs * kLanes);
  });
  for (int64_t j = 0; j < count; ++j, values += value_row) {
    VecF weight[kRows];
    unrolled<kRows>(
        [&](auto r) __attribute__((always_inline)) { weight[r] = broadcast(p[r * p_row + j]); });
    unrolled<kVecs>([&](auto v) __attribute__((always_inline)) {
      const VecF value = load(values + v * kLanes);
      unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
        acc[r][v] = fma(weight[r], value, acc[r][v]);
      });
    });
  }
  unrolled<kRows * kVecs>([&](auto t) __attribute__((always_inline)) {
    store(out + t / kVecs * out_row + t % kVecs * kLanes, acc[t / kVecs][t % kVecs]);
  });
}

// The last lanes of a value row that is no whole number of vectors (AVX-512 alone). `out` is
// padded.
template <class T>
inline void weigh_tail(const float* p, const T* values, int64_t value_row, int64_t count, int tail,
                       float* out) {
  VecF acc = load(out);
  for (int64_t j = 0; j < count; ++j) {
    acc = fma(broadcast(p[j]), load_partial(values + j * value_row, tail), acc);
  }
  store(out, acc);
}

template <class T, int kRows, int kVecs>
inline void weigh_rows(const float* p, int64_t p_row, const T* values, int64_t value_row,
                       int64_t count, int64_t dim, float* out, int64_t out_row) {
  int64_t e = 0;
  for (; e + kVecs * kLanes <= dim; e += kVecs * kLanes) {
    weigh_tile<T, kRows, kVecs>(p, p_row, values + e, value_row, count, out + e, out_row);
  }
  for (; e + kLanes <= dim; e += kLanes) {
    weigh_tile<T, kRows, 1>(p, p_row, values + e, value_row, count, out + e, out_row);
  }
  for (int r = 0; r < kRows && e < dim; ++r) {
    weigh_tail(p + r * p_row, values + e, value_row, count, static_cast<int>(dim - e),
               out + r * out_row + e);
  }
}

// `out` rows are padded to whole vectors.
template <class T>
inline void weigh_values(int64_t rows, const float* p, int64_t p_row, const T* values,
                         int64_t value_row, int64_t count, int64_t dim, float* out,
                         int64_t out_row) {
  for (; rows >= 4; rows -= 4, p += 4 * p_row, out += 4 * out_row) {
    weigh_rows<T, 4, 2>(p, p_row, values, value_row, count, dim, out, out_row);
  }
  for (; rows >= 2; rows -= 2, p += 2 * p_row, out += 2 * out_row) {
    weigh_rows<T, 2, 4>(p, p_row, values, value_row, count, dim, out, out_row);
  }
  if (rows > 0) weigh_rows<T, 1, 8>(p, p_row, values, value_row, count, dim, out, out_row);
}

}  // namespace flashkern::FK_ISA::attention
