// A chunk of logits in a warp's registers: 128-bit loads from any address.
//
// Lane l holds elements (32 j + l) E .. + E - 1 of the chunk in vector j, E = 16 / sizeof(T): that
// map knows the chunk, not the address, so sums do not depend on where a row lies. A row that is
// not 16-byte aligned (an odd vocabulary) costs 16-bit elements a second, cached load and a funnel
// shift, and float32 four loads for one; only the chunks at a row's two ends, whose aligned window
// would leave the row, load element by element.
#pragma once

#include "beam/plan.h"
#include "beam/score.h"
#include "ptx/convert.h"
#include "ptx/core.h"

namespace flashkern::beam::sm80 {

template <class T>
inline constexpr int kPerVector = 16 / sizeof(T);
template <class T>
inline constexpr int kVectors = kChunk / (32 * kPerVector<T>);

template <class T>
struct Chunk {
  uint4 v[kVectors<T>];
};

// The first element, within the chunk, of this lane's vector j.
template <class T>
FK_DEVICE uint32_t first_element(int j) {
  return (32 * j + ptx::lane_id()) * kPerVector<T>;
}

FK_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
FK_DEVICE uint32_t bits_of(BFloat16 x) { return x.bits; }
FK_DEVICE uint32_t bits_of(Half x) { return x.bits; }

FK_DEVICE void values(const uint4& v, float (&x)[4], float) {
  x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y);
  x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
}
template <class T>
FK_DEVICE void values(const uint4& v, float (&x)[8], T) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = ptx::unpack<T>(words[i]);
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
  }
}

// Which of a lane's elements count: all, or those whose bit is set (allowed.h).
struct AllElements {};
FK_DEVICE bool has(AllElements, int) { return true; }
FK_DEVICE bool has(uint32_t mask, int i) { return mask >> i & 1; }

// Calls f(x, element) for all that this lane holds and the mask has.
template <class T, class Mask, class F>
FK_DEVICE void each_element(const Chunk<T>& chunk, Mask mask, F&& f) {
#pragma unroll
  for (int j = 0; j < kVectors<T>; ++j) {
    float x[kPerVector<T>];
    values(chunk.v[j], x, T{});
#pragma unroll
    for (int i = 0; i < kPerVector<T>; ++i) {
      if (has(mask, j * kPerVector<T> + i)) f(x[i], first_element<T>(j) + i);
    }
  }
}
template <class T, class F>
FK_DEVICE void each_element(const Chunk<T>& chunk, F&& f) {
  each_element(chunk, AllElements(), f);
}

// 16 bytes from p, which lies `skew` bytes behind a multiple of 16.
FK_DEVICE uint4 load_skewed(const float* p, uint32_t) {
  const auto* words = reinterpret_cast<const uint32_t*>(p);
  return {__ldg(words), __ldg(words + 1), __ldg(words + 2), __ldg(words + 3)};
}
// Reads 32 bytes from that multiple on.
template <class T>
FK_DEVICE uint4 load_skewed(const T* p, uint32_t skew) {
  const auto* aligned =
      reinterpret_cast<const uint4*>(reinterpret_cast<const unsigned char*>(p) - skew);
  const uint4 low = __ldg(aligned), high = __ldg(aligned + 1);
  uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (skew & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
  }
  if (skew & 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
  }
  const uint32_t shift = 8 * (skew & 3);
  return {__funnelshift_r(w[0], w[1], shift), __funnelshift_r(w[1], w[2], shift),
          __funnelshift_r(w[2], w[3], shift), __funnelshift_r(w[3], w[4], shift)};
}

// Element by element; what lies beyond the row is -inf.
template <class T>
FK_DEVICE uint4 load_guarded(const T* row, int64_t first, int64_t vocab) {
  constexpr int kPerWord = kPerVector<T> / 4;
  uint32_t w[4] = {};
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) {
    const bool inside = first + i < vocab;
    const uint32_t bits = bits_of(inside ? row[first + i] : ptx::from_float<T>(-kInfinity));
    w[i / kPerWord] |= bits << (32 / kPerWord * (i % kPerWord));
  }
  return {w[0], w[1], w[2], w[3]};
}

template <class T>
FK_DEVICE void load_chunk(Chunk<T>& chunk, const T* row, uint32_t index, int64_t vocab) {
  const int64_t start = index * kChunk;
  const uint32_t skew = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(row + start) % 16);
  const bool whole = start + kChunk <= vocab;
  if (whole && skew == 0) {
#pragma unroll
    for (int j = 0; j < kVectors<T>; ++j) {
      chunk.v[j] = __ldg(reinterpret_cast<const uint4*>(row + start + first_element<T>(j)));
    }
  } else if (whole && index > 0 && start + kChunk + kPerVector<T> <= vocab) {
#pragma unroll
    for (int j = 0; j < kVectors<T>; ++j) {
      chunk.v[j] = load_skewed(row + start + first_element<T>(j), skew);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVectors<T>; ++j) {
      chunk.v[j] = load_guarded(row, start + first_element<T>(j), vocab);
    }
  }
}

}  // namespace flashkern::beam::sm80
