#include "simd/check.h"

#include <vector>

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

void simd_pairs(const SimdPairsParams& p, const Threads&) {
  std::vector<BFloat16> a(p.rows * p.depth);
  for (size_t i = 0; i < a.size(); ++i) a[i] = from_float<BFloat16>(p.a[i]);
  const int64_t steps = p.depth / 2;
  std::vector<float> b(steps * p.columns + kLanes);
  for (int64_t k = 0; k < steps; ++k) {
    const float* row = p.b + 2 * k * p.columns;
    for (int64_t n = 0; n < p.columns; n += kLanes) {
      const int count = static_cast<int>(p.columns - n < kLanes ? p.columns - n : kLanes);
      const VecF second = load_partial(row + p.columns + n, count);
      store(b.data() + k * p.columns + n, round_to_pairs(load_partial(row + n, count), second));
    }
  }
  const GemmOperands<BFloat16> g{a.data(),  p.depth, 2,         b.data(),
                                 p.columns, p.c,     p.columns, p.scale};
  if (p.accumulate) {
    gemm<true>(p.rows, p.columns, steps, g);
  } else {
    gemm<false>(p.rows, p.columns, steps, g);
  }
}

}  // namespace flashkern::FK_ISA
