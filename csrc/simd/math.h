// exp, 2^x and tanh on vectors. Polynomials are minimax fits of relative error; each function's
// error bound stands beside it and a test holds it over the whole range.
#pragma once

#include "simd/vec.h"

namespace flashkern::FK_ISA {

// Horner's scheme, the coefficient of the greatest power first.
template <class... Real>
inline VecF polynomial(VecF x, float first, Real... others) {
  VecF sum = broadcast(first);
  ((sum = fma(sum, x, broadcast(others))), ...);
  return sum;
}

// Nearest integer as a float and as an integer, for |x| < 2^22: adding 1.5 * 2^23 leaves the
// integer in the low bits of the mantissa.
struct Rounded {
  VecF value;
  VecI integer;
};
inline Rounded round_to_int(VecF x) {
  const VecF shifted = x + 0x1.8p23f;
  const VecI bits = reinterpret_cast<VecI>(shifted) - 0x4b400000;
  return {shifted - 0x1.8p23f, bits};
}

// 2^n for n in [-127, 128]: 0 at -127, infinity at 128.
inline VecF power_of_two(VecI n) { return reinterpret_cast<VecF>((n + 127) << 23); }

// 2^x for x <= 0, as a softmax needs it: 2.75 ulp, exactly 0 below -125, and every NaN stays.
#if defined(__AVX512F__)
inline VecF exp2_below_zero(VecF x) {
  const VecF f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
  const VecF p = polynomial(f, 1.879318617284298e-3f, 8.990997448563576e-3f, 5.581868067383766e-2f,
                            2.40159273147583e-1f, 6.931517124176025e-1f, 1.f);
  const __mmask16 above = _mm512_cmp_ps_mask(x, broadcast(-125.f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(above, p, x);  // p * 2^floor(x)
}
#else
// The factor 2^n multiplies: added to the exponent's bits it would turn some NaNs into numbers.
// What lies below the threshold may overflow on the way, since it is thrown away.
inline VecF exp2_below_zero(VecF x) {
  const VecF magic = broadcast(0x1.8p23f + 127.f);  // << 23 then makes n + 127 the bits of 2^n
  const VecF shifted = x + magic;
  const VecF f = x - (shifted - magic);
  const VecF p = polynomial(f, 1.3264723820611835e-3f, 9.671512991189957e-3f, 5.550733581185341e-2f,
                            2.4022242426872253e-1f, 6.931470036506653e-1f, 1.f);
  const VecF scaled = p * bits_to_float(float_to_bits(shifted) << 23);
  return x < -125.f ? VecF{} : scaled;
}
#endif

// e^x to 2 ulp: x = n ln2 + r with ln2 in two parts, so large |x| loses nothing.
inline VecF exp(VecF x) {
  const VecF low = broadcast(-88.1f), high = broadcast(88.8f);
  const VecF clamped = x < low ? low : x;
  x = clamped > high ? high : clamped;
  const Rounded n = round_to_int(x * 1.44269504f);
  VecF r = fma(n.value, broadcast(-0.693359375f), x);
  r = fma(n.value, broadcast(2.12194440e-4f), r);
  const VecF p = polynomial(r, 1.3843652559444308e-3f, 8.37415549904108e-3f, 4.166800156235695e-2f,
                            1.6666431725025177e-1f, 4.999999403953552e-1f, 1.f, 1.f);
  return p * power_of_two(n.integer);
}

// tanh to 4 ulp: an odd polynomial near zero, 1 - 2 / (e^2|x| + 1) elsewhere.
inline VecF tanh(VecF x) {
  const VecF magnitude = bits_to_float(float_to_bits(x) & 0x7fffffffu);
  const VecU sign = float_to_bits(x) & 0x80000000u;
  const VecF big = 1.f - 2.f / (exp(magnitude + magnitude) + 1.f);
  const VecF z = x * x;
  const VecF p = polynomial(z, -5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                            1.33314422036e-1f, -3.33332819422e-1f);
  const VecF small = fma(p * z, x, x);
  return magnitude < 0.625f ? small : bits_to_float(float_to_bits(big) | sign);
}

}  // namespace flashkern::FK_ISA
