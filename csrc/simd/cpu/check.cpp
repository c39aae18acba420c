#include "simd/check.h"

#include "simd/gemm.h"
#include "simd/math.h"
#include "simd/philox.h"

namespace flashkern::FK_ISA {
namespace {

template <class T>
VecF round_trip(VecF x) {
  T stored[kLanes];
  store(stored, x);
  return load(stored);
}

VecF apply(SimdFunction function, VecF x) {
  switch (function) {
    case SimdFunction::kExp:
      return exp(x);
    case SimdFunction::kExp2BelowZero:
      return exp2_below_zero(x);
    case SimdFunction::kTanh:
      return tanh(x);
    case SimdFunction::kBFloat16:
      return round_trip<BFloat16>(x);
    case SimdFunction::kHalf:
      return round_trip<Half>(x);
  }
  return x;
}

}  // namespace

void simd_map(const SimdMapParams& p, const Threads&) {
  for (int64_t i = 0; i < p.count; i += kLanes) {
    const int n = static_cast<int>(p.count - i < kLanes ? p.count - i : kLanes);
    store_partial(p.out + i, apply(p.function, load_partial(p.in + i, n)), n);
  }
}

void simd_philox(const SimdPhiloxParams& p, const Threads&) {
  philox_row(p.key, p.begin, p.count, p.c1, p.c2, p.c3, p.out);
}

void simd_gemm(const SimdGemmParams& p, const Threads&) {
  const GemmOperands g{p.a, p.a_row, p.a_col, p.b, p.b_row, p.c, p.c_row};
  if (p.accumulate) {
    gemm<true>(p.rows, p.columns, p.depth, g);
  } else {
    gemm<false>(p.rows, p.columns, p.depth, g);
  }
}

}  // namespace flashkern::FK_ISA
