// The pass over the logits: each chunk's greatest, and each slice's sum of exp(logit - reference).
//
// Each logit is loaded once, so what its exponential is taken from is known before the greatest is:
// the reference is the greatest of a slice's first logits, and rises where a chunk has one that is
// greater by more than kFar. What was summed is scaled then, and the chunk is summed again. No sum
// is below 1, for the reference is one of its logits.
//
// Sums run in 32 lanes whatever the ISA's width (load_group says which logit goes where), chunk by
// chunk, and are folded by halves: AVX2 and AVX-512, both with fused multiply-add, give the same
// bits.
//
// Source of the one-pass softmax statistics: Milakov and Gimelshein, Online normalizer calculation
// for softmax (arXiv 1805.02867).
#pragma once

#include <algorithm>
#include <cmath>

#include "beam/plan.h"
#include "beam/score.h"
#include "simd/vec.h"

namespace flashkern::FK_ISA::topk {

using beam::kChunk;
using beam::kGroup;
using beam::kNaN;

inline constexpr int kVecs = kGroup / kLanes;  // vectors in a group: 2, 4 or 8

// 32 lanes of partial results: 2j holds the first 16, 2j + 1 the second, from j * kLanes on.
struct Group {
  VecF v[kVecs];

  explicit Group(float x) {
    for (auto& lane : v) lane = broadcast(x);
  }
  void operator+=(const Group& other) {
    for (int i = 0; i < kVecs; ++i) v[i] += other.v[i];
  }
  void operator*=(float by) {
    for (auto& lane : v) lane *= by;
  }
  VecF added() const {
    VecF sums[kVecs / 2];
    for (int j = 0; j < kVecs / 2; ++j) sums[j] = v[2 * j] + v[2 * j + 1];
    for (int half = kVecs / 4; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
    }
    return sums[0];
  }
  float greatest() const {
    VecF top = v[0];
    for (int i = 1; i < kVecs; ++i) top = max(v[i], top);
    return reduce_max(top);
  }
};

// e^x = fraction * power, for x up to kFar; NaN stays NaN. Good to 2.5 ulp near 0 and to |x| 2e-8
// elsewhere. Below -87 it is some 1e-38 instead of nothing, which no sum near 1 can feel.
//
// Several vectors go in step, operation by operation: one after the other they would fill the
// CPU's scheduler with operations that wait, and run at half the speed.
template <int N>
struct Exps {
  VecF fraction[N], power[N];

  explicit Exps(const VecF (&given)[N]) {
    // n = round(x log2 e) sits in the low bits once 1.5 * 2^23 is added; the 127 makes n << 23
    // equal 2^n.
    const VecF magic = broadcast(0x1.8p23f + 127.f), log2e = broadcast(1.44269504f);
    VecF x[N], shifted[N];
    // max: the second operand where it is NaN
    unrolled<N>([&](auto i) { x[i] = max(broadcast(-87.f), given[i]); });
    unrolled<N>([&](auto i) { shifted[i] = fma(x[i], log2e, magic); });
    unrolled<N>([&](auto i) { x[i] = fma(x[i], log2e, magic - shifted[i]); });
    unrolled<N>([&](auto i) { power[i] = bits_to_float(float_to_bits(shifted[i]) << 23); });
    unrolled<N>([&](auto i) { fraction[i] = broadcast(1.3264723820611835e-3f); });
    for (const float c : {9.671512991189957e-3f, 5.550733581185341e-2f, 2.4022242426872253e-1f,
                          6.931470036506653e-1f, 1.f}) {
      unrolled<N>([&](auto i) { fraction[i] = fma(fraction[i], x[i], broadcast(c)); });
    }
  }
};

// sum + weight * e^x
inline VecF add_exp(VecF sum, VecF x, VecF weight) {
  const Exps<1> e({x});
  return fma(e.fraction[0] * weight, e.power[0], sum);
}

// How far ahead of the exponentials logits are asked for: more than memory's latency.
inline constexpr uintptr_t kAheadBytes = 8192;
// How far a logit may lie above the reference: its exponential is good to kFar * 2e-8.
inline constexpr float kFar = 20.f;

// Vectors 2j and 2j + 1 of a group. Numbers of 16 bits go by pairs, first and second: one
// instruction for each vector.
inline void load_two(const BFloat16* group, int j, VecF& first, VecF& second) {
  VecF pairs;
  std::memcpy(&pairs, group + 2 * j * kLanes, sizeof pairs);
  first = first_of(pairs);
  second = second_of(pairs);
}
template <class T>
void load_two(const T* group, int j, VecF& first, VecF& second) {
  first = load(group + j * kLanes);
  second = load(group + kGroup / 2 + j * kLanes);
}

// The greatest of whole groups, NaN passed over.
template <class T>
float max_of(const T* logits, int64_t count) {
  Group top(-kInf);
  for (int64_t i = 0; i < count; i += kGroup) {
    for (int j = 0; j < kVecs / 2; ++j) {
      VecF x, y;
      load_two(logits + i, j, x, y);
      top.v[2 * j] = max(x, top.v[2 * j]);
      top.v[2 * j + 1] = max(y, top.v[2 * j + 1]);
    }
  }
  return top.greatest();
}

template <class T>
bool has_nan(const T* logits, int64_t count) {
  VecI unordered{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const VecF x = load(logits + i);
    unordered |= x != x;
  }
  return any(unordered);
}

// fn(logits, count) with count in whole groups: -inf stands behind the last ones.
template <class T, class Fn>
float in_groups(const T* logits, int64_t count, Fn&& fn) {
  if (count % kGroup == 0) return fn(logits, count);
  T padded[kChunk];
  const int64_t whole = (count / kGroup + 1) * kGroup;
  std::copy(logits, logits + count, padded);
  std::fill(padded + count, padded + whole, from_float<T>(-kInf));
  return fn(padded, whole);
}

// The greatest of at most kChunk logits; NaN where one is.
template <class T>
float greatest_of(const T* logits, int64_t count) {
  return in_groups(logits, count, [](const T* logits, int64_t count) {
    return has_nan(logits, count) ? kNaN : max_of(logits, count);
  });
}

// Adds the exponentials of whole groups to a sum. Returns the greatest logit, NaN passed over.
template <class T>
float add_exps(const T* logits, int64_t count, float reference, Group& sum) {
  Group top(-kInf);
  const VecF shift = broadcast(reference);
  const auto ahead = reinterpret_cast<uintptr_t>(logits) + kAheadBytes;
  for (int64_t i = 0; i < count; i += kGroup) {
    const auto next = reinterpret_cast<const char*>(ahead + i * sizeof(T));
    for (size_t at = 0; at < kGroup * sizeof(T); at += 64) __builtin_prefetch(next + at);
    for (int j = 0; j < kVecs; j += 2) {
      VecF x, y;
      load_two(logits + i, j / 2, x, y);
      top.v[j] = max(x, top.v[j]);
      top.v[j + 1] = max(y, top.v[j + 1]);
      const Exps<2> e({x - shift, y - shift});
      sum.v[j] = fma(e.fraction[0], e.power[0], sum.v[j]);
      sum.v[j + 1] = fma(e.fraction[1], e.power[1], sum.v[j + 1]);
    }
  }
  return top.greatest();
}

// A slice, chunk after chunk.
class Scan {
 public:
  // A chunk's greatest logit; NaN where one is.
  template <class T>
  float chunk(const T* logits, int64_t count) {
    return in_groups(logits, count, [&](const T* p, int64_t n) { return add(p, n); });
  }

  float reference() const { return from; }  // -inf where no logit is greater
  float sum() const {
    const float sum = reduce_add(total.added());
    return from == -kInf && sum == sum ? 0.f : sum;
  }

 private:
  template <class T>
  float add(const T* logits, int64_t count) {
    if (from == -kInf) from = max_of(logits, kGroup);
    Group own(0.f);
    const float greatest = add_exps(logits, count, from == -kInf ? 0.f : from, own);
    if (greatest > from + kFar) {
      rise(greatest);
      own = Group(0.f);
      add_exps(logits, count, from, own);
    }
    total += own;
    const VecF all = own.added();
    return any(all != all) ? kNaN : greatest;
  }

  void rise(float greatest) {
    total *= add_exp(VecF{}, broadcast(from - greatest), broadcast(1.f))[0];
    from = greatest;
  }

  float from = -kInf;
  Group total{0.f};
};

}  // namespace flashkern::FK_ISA::topk
