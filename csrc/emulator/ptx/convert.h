// Twin of csrc/ptx/convert.h.
#pragma once

#include <bit>
#include <cmath>

#include "ptx/core.h"
#include "types.h"

namespace flashkern::ptx {

struct Tf32 {};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
inline float to_float(Half x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return {0x7fff};  // as cvt.rn.bf16 does
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Half from_float<Half>(float x) {
  if (std::isnan(x)) return {0x7fff};
  return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))};
}

template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

template <class T>
float2 unpack(uint32_t pair) {
  return {to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})};
}

inline uint32_t to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (!std::isfinite(x)) return bits & 0xffffe000u;
  return (bits + 0x1000u) & 0xffffe000u;
}

namespace detail {
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
}  // namespace detail

inline float fast_exp2(float x) { return detail::flush(std::exp2(detail::flush(x))); }

}  // namespace flashkern::ptx
