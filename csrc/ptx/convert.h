// Between float32 and what tensor cores eat: pairs of bfloat16 or float16 in one register, TF32.
// And the fast exponential.
#pragma once

#include "ptx/core.h"
#include "types.h"

namespace flashkern::ptx {

struct Tf32 {};  // names the type of an mma whose operands are float32 cut to TF32

// Two numbers in one register, `low` in its low half; rounded to nearest even.
template <class T>
FK_DEVICE uint32_t pack(float low, float high);

template <>
FK_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
FK_DEVICE uint32_t pack<Half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

FK_DEVICE float to_float(float x) { return x; }
FK_DEVICE float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
FK_DEVICE float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <class T>
FK_DEVICE float2 unpack(uint32_t pair) {
  return {to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})};
}

template <class T>
FK_DEVICE T from_float(float x) {
  return T{static_cast<uint16_t>(pack<T>(x, 0.0f))};
}
template <>
FK_DEVICE float from_float<float>(float x) {
  return x;
}

// The nearest TF32 (10 bits of fraction), ties away from zero.
FK_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// 2^x within 2 ulp; subnormals are zeros. 2^-inf = 0.
FK_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace flashkern::ptx
