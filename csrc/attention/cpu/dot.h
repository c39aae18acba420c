// The two products of the decode kernel. Keys and values come straight from the cache, are widened
// in registers and used for every query row: memory traffic, not arithmetic, sets the pace.
//
//   scores[r][j] = sum_d q[r][d] keys[j][d]      4 keys: up to 4 x 4 dot products in registers
//   out[r][e]   += sum_j p[r][j] values[j][e]    the weights of 4 keys in registers, out in L1
//
// A core fills its share of the memory bus only if lines are asked for one after the other, as a
// stream. Each step of a product therefore also asks for the next lines of rows some KiB further
// on, row by row, whatever the order in which the product itself reads.
//
// Rows are taken two vectors at a time, in the order of lanes in which one load yields them:
// widening 32 bfloat16 costs a shift and a mask if the even ones fill one vector and the odd ones
// the other. Queries and accumulators keep that order until the end.
#pragma once

#include "simd/dot.h"

namespace flashkern::FK_ISA::attention {

inline constexpr int kPairLanes = 2 * kLanes;

struct VectorPair {
  VecF first, second;
};

template <class T>
inline VectorPair load_pair(const T* p) {
  return {load(p), load(p + kLanes)};
}
inline VectorPair load_pair(const BFloat16* p) {
  VecU both;
  std::memcpy(&both, p, sizeof both);
  return {bits_to_float(both << 16), bits_to_float(both & 0xffff0000u)};
}

// The first n elements, fewer than a pair's, with zeros behind.
template <class T>
inline VectorPair load_partial_pair(const T* p, int n) {
  if (n < kLanes) return {load_partial(p, n), VecF{}};
  return {load(p), load_partial(p + kLanes, n - kLanes)};
}
inline VectorPair load_partial_pair(const BFloat16* p, int n) {
#if defined(__AVX512F__)
  const auto both = reinterpret_cast<VecU>(_mm512_maskz_loadu_epi16((1u << n) - 1, p));
  return {bits_to_float(both << 16), bits_to_float(both & 0xffff0000u)};
#else
  BFloat16 padded[kPairLanes] = {};
  std::memcpy(padded, p, n * sizeof(BFloat16));
  return load_pair(padded);
#endif
}

// From the order of load_pair<T> to that of memory.
template <class T>
inline void store_pair(float* out, VectorPair x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    for (int i = 0; i < kLanes; ++i) out[2 * i] = x.first[i], out[2 * i + 1] = x.second[i];
  } else {
    store(out, x.first);
    store(out + kLanes, x.second);
  }
}

// step(d, load) for every pair of vectors of a row of `dim` elements, the last one maybe in part.
// Not unrolled: each load instruction then walks line by line, a stride that the hardware's
// prefetcher follows.
template <class T, class Step>
__attribute__((always_inline)) inline void along_row(int64_t dim, Step&& step) {
  int64_t d = 0;
  for (; d + kPairLanes <= dim; d += kPairLanes) {
    step(d, [](const T* at) __attribute__((always_inline)) { return load_pair(at); });
  }
  if (d < dim) {
    const int tail = static_cast<int>(dim - d);
    step(d, [tail](const T* at)
                __attribute__((always_inline)) { return load_partial_pair(at, tail); });
  }
}

// Rows of the cache that are met together, and rows further on that are asked for meanwhile.
inline constexpr int kStreamRows = 4;

template <class T>
struct StreamRows {
  const T *row[kStreamRows], *next[kStreamRows];
};

// Asks for the lines of rows next[0], ..., next[3], one after the other.
template <class T>
class Ahead {
 public:
  Ahead(const StreamRows<T>& rows, int64_t first, int64_t dim)
      : next_(rows.next + first), last_(rows.next + kStreamRows - 1), dim_(dim) {
    turn();
  }

  // As many lines as kRows pairs of vectors fill.
  template <int kRows>
  __attribute__((always_inline)) void ask() {
    constexpr int kBytes = kRows * kPairLanes * static_cast<int>(sizeof(T));
    unrolled<(kBytes + 63) / 64>([&](auto) __attribute__((always_inline)) {
      __builtin_prefetch(at_);
      at_ += 64 / sizeof(T);
      if (at_ >= end_) turn();
    });
  }

 private:
  __attribute__((always_inline)) void turn() {
    at_ = *next_;
    end_ = at_ + dim_;
    if (next_ != last_) ++next_;
  }

  const T *const *next_, *const *last_;
  const int64_t dim_;
  const T *at_, *end_;
};

// Query rows that a product takes at once. The first ones ask for what lies ahead.
inline constexpr int kMostRows = kLanes == 16 ? 4 : 2;

// fn(constant kRows, first row) over `rows` rows.
template <int kRows = kMostRows, class Fn>
inline void tile_rows(int64_t rows, Fn&& fn, int64_t first = 0) {
  for (; rows - first >= kRows; first += kRows) fn(std::integral_constant<int, kRows>(), first);
  if constexpr (kRows > 1) {
    if (first < rows) tile_rows<kRows - 1>(rows, fn, first);
  }
}

// kRows rows of scores for the keys of a group.
template <int kRows, class T>
inline void dot_rows(bool lead, const float* q, int64_t q_row, const StreamRows<T>& keys,
                     int64_t dim, float* scores, int64_t score_row) {
  VecF acc[kRows][4];
  unrolled<kRows * 4>([&](auto t) __attribute__((always_inline)) { acc[t / 4][t % 4] = VecF{}; });
  Ahead<T> ahead(keys, 0, dim);
  along_row<T>(dim, [&](int64_t d, auto load_key) __attribute__((always_inline)) {
    VectorPair query[kRows];
    unrolled<kRows>(
        [&](auto r) __attribute__((always_inline)) { query[r] = load_pair(q + r * q_row + d); });
    if (lead) ahead.template ask<4>();
    unrolled<4>([&](auto k) __attribute__((always_inline)) {
      const VectorPair key = load_key(keys.row[k] + d);
      unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
        acc[r][k] = fma(query[r].first, key.first, acc[r][k]);
        acc[r][k] = fma(query[r].second, key.second, acc[r][k]);
      });
    });
  });
  unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
    const Vec4 sums = sum_lanes(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
    std::memcpy(scores + r * score_row, &sums, sizeof sums);
  });
}

template <class T>
inline void dot_scores(int64_t rows, const float* q, int64_t q_row, const StreamRows<T>& keys,
                       int64_t dim, float* scores, int64_t score_row) {
  tile_rows(rows, [&](auto count, int64_t r) {
    dot_rows<count>(r == 0, q + r * q_row, q_row, keys, dim, scores + r * score_row, score_row);
  });
}

// kRows rows of `out` meet kKeys values of a group, from the j-th on.
template <int kRows, int kKeys, class T>
inline void weigh_rows(bool lead, const float* p, int64_t p_row, const StreamRows<T>& values,
                       int64_t j, int64_t dim, float* out, int64_t out_row) {
  VecF weight[kRows][kKeys];
  unrolled<kRows * kKeys>([&](auto t) __attribute__((always_inline)) {
    weight[t / kKeys][t % kKeys] = broadcast(p[t / kKeys * p_row + j + t % kKeys]);
  });
  Ahead<T> ahead(values, j, dim);
  along_row<T>(dim, [&](int64_t e, auto load_value) __attribute__((always_inline)) {
    VectorPair value[kKeys];
    unrolled<kKeys>([&](auto k) __attribute__((always_inline)) {
      value[k] = load_value(values.row[j + k] + e);
    });
    if (lead) ahead.template ask<kKeys>();
    unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
      float* at = out + r * out_row + e;
      VectorPair sum = load_pair(at);
      unrolled<kKeys>([&](auto k) __attribute__((always_inline)) {
        sum.first = fma(weight[r][k], value[k].first, sum.first);
        sum.second = fma(weight[r][k], value[k].second, sum.second);
      });
      store(at, sum.first);
      store(at + kLanes, sum.second);
    });
  });
}

template <int kKeys, class T>
inline void weigh_keys(int64_t rows, const float* p, int64_t p_row, const StreamRows<T>& values,
                       int64_t j, int64_t dim, float* out, int64_t out_row) {
  tile_rows(rows, [&](auto count, int64_t r) {
    weigh_rows<count, kKeys>(r == 0, p + r * p_row, p_row, values, j, dim, out + r * out_row,
                             out_row);
  });
}

// The first `count` values of a group.
template <class T>
inline void weigh_values(int64_t rows, const float* p, int64_t p_row, const StreamRows<T>& values,
                         int64_t count, int64_t dim, float* out, int64_t out_row) {
  int64_t j = 0;
  for (; j + kStreamRows <= count; j += kStreamRows) {
    weigh_keys<kStreamRows>(rows, p, p_row, values, j, dim, out, out_row);
  }
  for (; j < count; ++j) weigh_keys<1>(rows, p, p_row, values, j, dim, out, out_row);
}

}  // namespace flashkern::FK_ISA::attention
