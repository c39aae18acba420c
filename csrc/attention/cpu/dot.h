// The two products of the decode kernel. Keys and values come straight from the cache, are widened
// in registers and used for every query row: memory traffic, not arithmetic, sets the pace.
//
//   scores[r][j] = sum_d q[r][d] keys[j][d]      4 keys: up to 4 x 4 dot products in registers
//   out[r][e]   += sum_j p[r][j] values[j][e]    the weights of 4 keys in registers, out in L1
//
// A core fills its share of the memory bus only if lines are asked for one after the other, as a
// stream. Each step of a product therefore also asks for lines of rows some KiB further on, in the
// order of memory, whatever the order in which the product itself reads.
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

// Rows that are met one after another, and where rows that lie further on begin.
template <class T>
struct StreamRows {
  const T* rows;
  int64_t row;  // from one to the next, in elements
  int64_t count;
  const T* next;
};

// Rows of the cache that share a step of a product.
inline constexpr int kStreamRows = 4;

// Asks for the lines of rows further on: as many in each step as the product reads, in the order of
// memory where rows follow one another without a gap.
template <class T>
class Ahead {
  static constexpr int64_t kStep = kPairLanes * sizeof(T);  // bytes of a row
  static constexpr int64_t kLine = kStep < 64 ? kStep : 64;

 public:
  Ahead(const StreamRows<T>& rows, int64_t dim)
      : at_(reinterpret_cast<uintptr_t>(rows.next)),
        row_(rows.row == dim ? kStep : rows.row * sizeof(T)),
        step_(rows.row == dim ? kStreamRows * kStep : kStep),
        group_(rows.row == dim ? 0 : (kStreamRows * rows.row - dim) * sizeof(T)) {}

  __attribute__((always_inline)) void step() {
    unrolled<kStreamRows>([&](auto k) __attribute__((always_inline)) {
      for (int64_t byte = 0; byte < kStep; byte += kLine) {
        __builtin_prefetch(reinterpret_cast<const void*>(at_ + k * row_ + byte));
      }
    });
    at_ += step_;
  }
  void end_group() { at_ += group_; }

 private:
  uintptr_t at_;  // a number: it may pass the end of an array
  int64_t row_, step_, group_;
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

// kRows rows of scores for kKeys keys, 1 or 4.
template <int kRows, int kKeys, class T, class Each>
__attribute__((always_inline)) inline void dot_group(const float* q, int64_t q_row, const T* keys,
                                                     int64_t key_row, int64_t dim, float* scores,
                                                     int64_t score_row, Each&& each_step) {
  VecF acc[kRows][4];
  unrolled<kRows * 4>([&](auto t) __attribute__((always_inline)) { acc[t / 4][t % 4] = VecF{}; });
  along_row<T>(dim, [&](int64_t d, auto load_key) __attribute__((always_inline)) {
    each_step();
    VectorPair query[kRows];
    unrolled<kRows>(
        [&](auto r) __attribute__((always_inline)) { query[r] = load_pair(q + r * q_row + d); });
    unrolled<kKeys>([&](auto k) __attribute__((always_inline)) {
      const VectorPair key = load_key(keys + k * key_row + d);
      unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
        acc[r][k] = fma(query[r].first, key.first, acc[r][k]);
        acc[r][k] = fma(query[r].second, key.second, acc[r][k]);
      });
    });
  });
  unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
    const Vec4 sums = sum_lanes(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
    std::memcpy(scores + r * score_row, &sums, kKeys * sizeof(float));
  });
}

template <int kRows, bool kLead, class T>
inline void dot_rows(const float* q, int64_t q_row, const StreamRows<T>& keys, int64_t dim,
                     float* scores, int64_t score_row) {
  const T* key = keys.rows;
  const int64_t row = keys.row;
  Ahead<T> ahead(keys, dim);
  int64_t left = keys.count;
  for (; left >= kStreamRows; left -= kStreamRows, key += kStreamRows * row) {
    dot_group<kRows, kStreamRows>(q, q_row, key, row, dim, scores, score_row, [&] {
      if constexpr (kLead) ahead.step();
    });
    ahead.end_group();
    scores += kStreamRows;
  }
  for (; left > 0; --left, key += row, ++scores) {
    dot_group<kRows, 1>(q, q_row, key, row, dim, scores, score_row, [] {});
  }
}

template <class T>
inline void dot_scores(int64_t rows, const float* q, int64_t q_row, const StreamRows<T>& keys,
                       int64_t dim, float* scores, int64_t score_row) {
  tile_rows(rows, [&](auto count, int64_t r) {
    const float* from = q + r * q_row;
    float* to = scores + r * score_row;
    if (r == 0) {
      dot_rows<count, true>(from, q_row, keys, dim, to, score_row);
    } else {
      dot_rows<count, false>(from, q_row, keys, dim, to, score_row);
    }
  });
}

// kRows rows of `out` meet kKeys values.
template <int kRows, int kKeys, class T, class Each>
__attribute__((always_inline)) inline void weigh_group(const float* p, int64_t p_row,
                                                       const T* values, int64_t value_row,
                                                       int64_t dim, float* out, int64_t out_row,
                                                       Each&& each_step) {
  VecF weight[kRows][kKeys];
  unrolled<kRows * kKeys>([&](auto t) __attribute__((always_inline)) {
    weight[t / kKeys][t % kKeys] = broadcast(p[t / kKeys * p_row + t % kKeys]);
  });
  along_row<T>(dim, [&](int64_t e, auto load_value) __attribute__((always_inline)) {
    each_step();
    VectorPair value[kKeys];
    unrolled<kKeys>([&](auto k) __attribute__((always_inline)) {
      value[k] = load_value(values + k * value_row + e);
    });
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

template <int kRows, bool kLead, class T>
inline void weigh_rows(const float* p, int64_t p_row, const StreamRows<T>& values, int64_t dim,
                       float* out, int64_t out_row) {
  const T* value = values.rows;
  const int64_t row = values.row;
  Ahead<T> ahead(values, dim);
  int64_t left = values.count;
  for (; left >= kStreamRows; left -= kStreamRows, value += kStreamRows * row) {
    weigh_group<kRows, kStreamRows>(p, p_row, value, row, dim, out, out_row, [&] {
      if constexpr (kLead) ahead.step();
    });
    ahead.end_group();
    p += kStreamRows;
  }
  for (; left > 0; --left, value += row, ++p) {
    weigh_group<kRows, 1>(p, p_row, value, row, dim, out, out_row, [] {});
  }
}

template <class T>
inline void weigh_values(int64_t rows, const float* p, int64_t p_row, const StreamRows<T>& values,
                         int64_t dim, float* out, int64_t out_row) {
  tile_rows(rows, [&](auto count, int64_t r) {
    const float* from = p + r * p_row;
    float* to = out + r * out_row;
    if (r == 0) {
      weigh_rows<count, true>(from, p_row, values, dim, to, out_row);
    } else {
      weigh_rows<count, false>(from, p_row, values, dim, to, out_row);
    }
  });
}

}  // namespace flashkern::FK_ISA::attention
