// The CPU vocabulary: a vector of floats as wide as the ISA's registers. GCC's vector extensions
// give the operators (+ - * / < ? :) on every ISA; intrinsics appear only where the extensions have
// no word.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "types.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace flashkern::FK_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#elif defined(FK_PORTABLE_LANES)  // tests the kernels at another width than the CPU's
inline constexpr int kLanes = FK_PORTABLE_LANES;
#else
inline constexpr int kLanes = 4;
#endif

using VecF = float __attribute__((vector_size(kLanes * 4)));
using VecI = int32_t __attribute__((vector_size(kLanes * 4)));  // also the masks: 0 or -1
using VecU = uint32_t __attribute__((vector_size(kLanes * 4)));
using VecU16 = uint16_t __attribute__((vector_size(kLanes * 2)));

inline constexpr float kInf = std::numeric_limits<float>::infinity();

inline VecF broadcast(float x) { return x - VecF{}; }
inline VecF bits_to_float(VecU u) { return reinterpret_cast<VecF>(u); }
inline VecU float_to_bits(VecF x) { return reinterpret_cast<VecU>(x); }

// fn(0), ..., fn(N - 1) with constant arguments. Loops over an array of accumulators have to vanish
// before the compiler decides what lives in registers; it unrolls plain loops too late for that.
template <int N, class Fn>
__attribute__((always_inline)) inline void unrolled(Fn&& fn) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (fn(std::integral_constant<int, I>()), ...);
  }(std::make_integer_sequence<int, N>());
}

// ---- primitives that differ by ISA ----

#if defined(__AVX512F__)
inline VecF fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a, b, c); }
inline VecF max(VecF a, VecF b) { return _mm512_max_ps(a, b); }
inline VecF min(VecF a, VecF b) { return _mm512_min_ps(a, b); }
#elif defined(__AVX2__)
inline VecF fma(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a, b, c); }
inline VecF max(VecF a, VecF b) { return _mm256_max_ps(a, b); }
inline VecF min(VecF a, VecF b) { return _mm256_min_ps(a, b); }
#else
inline VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }
inline VecF max(VecF a, VecF b) { return a > b ? a : b; }  // b where either is NaN
inline VecF min(VecF a, VecF b) { return a < b ? a : b; }
#endif

inline float reduce_add(VecF x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  float sum[kLanes];
  std::memcpy(sum, &x, sizeof x);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
  }
  return sum[0];
#endif
}

inline float reduce_max(VecF x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float top[kLanes];
  std::memcpy(top, &x, sizeof x);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) top[i] = top[i] > top[i + half] ? top[i] : top[i + half];
  }
  return top[0];
#endif
}

inline bool any(VecI mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#else
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= mask[i];
  return bits != 0;
#endif
}

// One bit for each lane of a mask, lane 0 lowest.
inline uint32_t bits(VecI mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (mask[i] & 1u) << i;
  return bits;
#endif
}

// ---- loads: whole vectors, and the first n lanes with zeros behind ----

inline VecF load(const float* p) {
  VecF x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// GCC widens 16-bit vectors by halves where one instruction does it: hence the intrinsics.
inline VecF load(const BFloat16* p) {
#if defined(__AVX512F__)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return bits_to_float(reinterpret_cast<VecU>(_mm512_cvtepu16_epi32(half)) << 16);
#elif defined(__AVX2__)
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return bits_to_float(reinterpret_cast<VecU>(_mm256_cvtepu16_epi32(half)) << 16);
#else
  VecU16 half;
  std::memcpy(&half, p, sizeof half);
  return bits_to_float(__builtin_convertvector(half, VecU) << 16);
#endif
}

inline VecF load(const Half* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VecU16 half;
  std::memcpy(&half, p, sizeof half);
  const VecU u = __builtin_convertvector(half, VecU);
  const VecU sign = (u & 0x8000u) << 16;
  const VecU magnitude = (u & 0x7fffu) << 13;
  // Scaling by 2^112 moves the exponent's bias and makes subnormals normal; inf and NaN follow
  // apart.
  const VecF scaled = bits_to_float(magnitude) * 0x1p112f;
  const VecU infinite = magnitude | 0x7f800000u;
  const VecU finite = float_to_bits(scaled);
  return bits_to_float(((u & 0x7c00u) == 0x7c00u ? infinite : finite) | sign);
#endif
}

template <class T>
inline VecF load_partial(const T* p, int n) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

#if defined(__AVX2__)
inline VecI first_lanes(int n) {
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < n;
}
inline VecF load_partial(const float* p, int n) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#else
  return _mm256_maskload_ps(p, reinterpret_cast<__m256i>(first_lanes(n)));
#endif
}
#endif

// ---- stores: rounded to nearest even; NaN stays NaN ----

inline void store(float* p, VecF x) { std::memcpy(p, &x, sizeof x); }

inline void store(BFloat16* p, VecF x) {
  const VecU u = float_to_bits(x);
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VecU quiet = VecU{} + 0x7fc0u;
  const VecU16 half = __builtin_convertvector(x == x ? rounded : quiet, VecU16);
  std::memcpy(p, &half, sizeof half);
}

inline void store(Half* p, VecF x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const VecU u = float_to_bits(x);
  const VecU sign = (u >> 16) & 0x8000u;
  const VecU magnitude = u & 0x7fffffffu;
  // Normal halves: rebias, round to even. Subnormal ones: adding 0.5 lets the FPU do the rounding.
  const VecU normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const VecU tiny = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const VecU nan = VecU{} + 0x7e00u;
  const VecU inf = VecU{} + 0x7c00u;
  VecU half = magnitude < 0x38800000u ? tiny : normal;
  half = magnitude >= 0x477ff000u ? inf : half;
  half = magnitude > 0x7f800000u ? nan : half;
  const VecU16 packed = __builtin_convertvector(half | sign, VecU16);
  std::memcpy(p, &packed, sizeof packed);
#endif
}

template <class T>
inline void store_partial(T* p, VecF x, int n) {
  T padded[kLanes];
  store(padded, x);
  std::memcpy(p, padded, n * sizeof(T));
}

#if defined(__AVX2__)
inline void store_partial(float* p, VecF x, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), x);
#else
  _mm256_maskstore_ps(p, reinterpret_cast<__m256i>(first_lanes(n)), x);
#endif
}
#endif

// ---- pairs of bfloat16: a lane holds two neighbours of a sum, the first in its low half ----

// Whether the ISA multiplies them, twice as many in an instruction as floats.
#if defined(__AVX512BF16__) || defined(FK_TILES)
inline constexpr bool kMultipliesPairs = true;
#else
inline constexpr bool kMultipliesPairs = false;
#endif

// Lanes of pairs travel as VecF and float*, and are never taken for floats.
struct BFloat16Pair {
  BFloat16 first, second;
};
inline VecF load(const BFloat16Pair* p) {
  VecF x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline VecF broadcast(BFloat16Pair x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits_to_float(VecU{} + bits);
}
inline VecF first_of(VecF pairs) { return bits_to_float(float_to_bits(pairs) << 16); }
inline VecF second_of(VecF pairs) { return bits_to_float(float_to_bits(pairs) & 0xffff0000u); }

// The bits of bfloat16 numbers, which floats hold exactly, side by side.
inline VecF join(VecF first, VecF second) {
  return bits_to_float(float_to_bits(first) >> 16 | float_to_bits(second));
}

// Rounded to nearest even; what is below 2^-126 may become 0.
inline VecF round_to_pairs(VecF first, VecF second) {
#if defined(__AVX512BF16__)
  const __m512i turn = _mm512_add_epi32(
      _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                         _mm512_set1_epi32(0x00010001)),
      _mm512_set1_epi32(0x00100000));
  const auto both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  return reinterpret_cast<VecF>(_mm512_permutexvar_epi16(turn, both));
#else
  BFloat16 half[2][kLanes];
  store(half[0], first);
  store(half[1], second);
  return join(load(half[0]), load(half[1]));
#endif
}

// Two vectors, one behind the other, rounded alike.
inline void store_rounded(BFloat16* p, VecF low, VecF high) {
#if defined(__AVX512BF16__)
  const auto both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  std::memcpy(p, &both, sizeof both);
#else
  store(p, low);
  store(p + kLanes, high);
#endif
}

// c + a.first * b.first + a.second * b.second
inline VecF multiply_pairs(VecF a, VecF b, VecF c) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#else
  return fma(second_of(a), second_of(b), fma(first_of(a), first_of(b), c));
#endif
}

// One element, through the same conversions.
template <class T>
inline float to_float(T x) {
  return load_partial(&x, 1)[0];
}
inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
inline T from_float(float x) {
  T out;
  store_partial(&out, broadcast(x), 1);
  return out;
}

}  // namespace flashkern::FK_ISA
