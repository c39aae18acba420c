// The pass over the logits: for each chunk its greatest logit and the sum of exp(logit - greatest).
//
// A chunk (1 or 2 KiB) is read twice, the second time from L1: maximum first, so that no
// exponential is ever rescaled. While the exponentials are summed the next chunk is on its way.
// Sums run in 16 lanes whatever the ISA's width (element i in lane i % 16) and are folded by
// halves, so that AVX2 and AVX-512, both with fused multiply-add, give the same bits.
//
// Source of the one-pass softmax statistics: Milakov and Gimelshein, Online normalizer calculation
// for softmax (arXiv 1805.02867).
#pragma once

#include <algorithm>

#include "beam/plan.h"
#include "simd/vec.h"

namespace flashkern::FK_ISA::topk {

using beam::kChunk;
using beam::kGroup;

inline constexpr int kVecs = kGroup / kLanes;  // vectors in a group: 1, 2 or 4

// 16 lanes of partial results.
struct Group {
  VecF v[kVecs];

  explicit Group(float x) {
    for (auto& lane : v) lane = broadcast(x);
  }
  VecF added() const {
    if constexpr (kVecs == 1) return v[0];
    if constexpr (kVecs == 2) return v[0] + v[1];
    if constexpr (kVecs == 4) return (v[0] + v[2]) + (v[1] + v[3]);
  }
  VecF greatest() const {
    VecF top = v[0];
    for (int i = 1; i < kVecs; ++i) top = max(v[i], top);
    return top;
  }
};

// sum + weight * e^x for x <= 0; NaN stays NaN. e^x is good to 2.5 ulp near 0 and to |x| 2e-8
// below, where it weighs less. Below -87 it adds some 1e-38 instead of nothing, which no sum that
// holds its own maximum (e^0) can feel.
inline VecF add_exp(VecF sum, VecF x, VecF weight) {
  // n = round(x log2 e) sits in the low bits once 1.5 * 2^23 is added; the 127 makes n << 23 equal
  // 2^n.
  const VecF magic = broadcast(0x1.8p23f + 127.f), log2e = broadcast(1.44269504f);
  x = max(broadcast(-87.f), x);  // the second operand where it is NaN
  const VecF shifted = fma(x, log2e, magic);
  const VecF f = fma(x, log2e, magic - shifted);
  VecF p = broadcast(1.3264723820611835e-3f);
  p = fma(p, f, broadcast(9.671512991189957e-3f));
  p = fma(p, f, broadcast(5.550733581185341e-2f));
  p = fma(p, f, broadcast(2.4022242426872253e-1f));
  p = fma(p, f, broadcast(6.931470036506653e-1f));
  p = fma(p, f, broadcast(1.f));
  return fma(p * weight, bits_to_float(float_to_bits(shifted) << 23), sum);
}

inline VecF add_exp(VecF sum, VecF x) { return add_exp(sum, x, broadcast(1.f)); }

// How far ahead of the exponentials logits are asked for: more than memory's latency.
inline constexpr uintptr_t kAheadBytes = 8192;

struct ChunkStats {
  float greatest;  // NaN where a logit is NaN
  float sum;       // of exp(logit - greatest); 0 where every logit is -inf
};

template <class T>
float chunk_max(const T* logits, int64_t count) {
  Group even(-kInf), odd(-kInf);
  int64_t i = 0;
  for (; i + 2 * kGroup <= count; i += 2 * kGroup) {
    for (int j = 0; j < kVecs; ++j) even.v[j] = max(load(logits + i + j * kLanes), even.v[j]);
    for (int j = 0; j < kVecs; ++j)
      odd.v[j] = max(load(logits + i + kGroup + j * kLanes), odd.v[j]);
  }
  for (; i < count; i += kGroup) {
    for (int j = 0; j < kVecs; ++j) even.v[j] = max(load(logits + i + j * kLanes), even.v[j]);
  }
  return reduce_max(max(even.greatest(), odd.greatest()));
}

template <class T>
float chunk_sum(const T* logits, int64_t count, float reference) {
  Group sum(0.f);
  const VecF shift = broadcast(reference);
  const uintptr_t next = reinterpret_cast<uintptr_t>(logits) + kAheadBytes;
  for (int64_t i = 0; i < count; i += kGroup) {
    __builtin_prefetch(reinterpret_cast<const char*>(next + i * sizeof(T)));
    for (int j = 0; j < kVecs; ++j) {
      sum.v[j] = add_exp(sum.v[j], load(logits + i + j * kLanes) - shift);
    }
  }
  return reduce_add(sum.added());
}

template <class T>
bool chunk_has_nan(const T* logits, int64_t count) {
  VecI unordered{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const VecF x = load(logits + i);
    unordered |= x != x;
  }
  return any(unordered);
}

// count is a whole number of groups, at most kChunk. want_sum: false where the caller gave the
// logsumexp.
template <class T>
ChunkStats scan_groups(const T* logits, int64_t count, bool want_sum) {
  ChunkStats stats{chunk_max(logits, count), 0.f};
  if (want_sum) {
    const bool masked = stats.greatest == -kInf;
    stats.sum = chunk_sum(logits, count, masked ? 0.f : stats.greatest);
    if (stats.sum != stats.sum) {
      stats.greatest = stats.sum;
    } else if (masked) {
      stats.sum = 0.f;
    }
  } else if (chunk_has_nan(logits, count)) {
    stats.greatest = std::numeric_limits<float>::quiet_NaN();
  }
  return stats;
}

template <class T>
ChunkStats scan_chunk(const T* logits, int64_t count, bool want_sum) {
  if (count % kGroup == 0) return scan_groups(logits, count, want_sum);
  T padded[kChunk];
  const int64_t whole = (count / kGroup + 1) * kGroup;
  std::copy(logits, logits + count, padded);
  std::fill(padded + count, padded + whole, from_float<T>(-kInf));
  return scan_groups(padded, whole, want_sum);
}

}  // namespace flashkern::FK_ISA::topk
