#include "simd/check.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "simd/gemm.h"
#include "simd/math.h"
#include "simd/philox.h"
#include "simd/tile_gemm.h"

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

// Through copies of whole tiles; what lies around a matrix is NaN where it may count for nothing.
void by_tiles(const SimdPairsParams& p, const BFloat16* a, const float* b) {
  const TileScope tiles;
  const auto padded = [](int64_t n, int64_t unit) { return tiles_of(n, unit) * unit; };
  const int64_t rows = padded(p.rows, kTileSide), columns = padded(p.columns, kTileSide);
  const int64_t depth = padded(p.depth, kTileDepth);
  std::vector<BFloat16> left(rows * depth, BFloat16{0x7fc0});
  std::vector<float> right(depth / 2 * columns, std::numeric_limits<float>::quiet_NaN());
  std::vector<float> c(rows * columns);
  for (int64_t i = 0; i < p.rows; ++i) {
    std::fill_n(left.begin() + i * depth, depth, BFloat16{0});
    std::copy_n(a + i * p.depth, p.depth, left.begin() + i * depth);
    for (int64_t j = 0; j < p.columns && p.accumulate; ++j) {
      c[i * columns + j] = p.c[i * p.columns + j] / p.scale;
    }
  }
  for (int64_t k = 0; k < depth / 2; ++k) {
    for (int64_t j = 0; j < p.columns; ++j) {
      right[k * columns + j] = k < p.depth / 2 ? b[k * p.columns + j] : 0.f;
    }
  }
  const auto product = p.accumulate ? tile_gemm<true> : tile_gemm<false>;
  product(p.rows, p.columns, p.depth,
          {left.data(), depth, right.data(), columns, c.data(), columns});
  for (int64_t i = 0; i < p.rows; ++i) {
    for (int64_t j = 0; j < p.columns; ++j) {
      p.c[i * p.columns + j] = c[i * columns + j] * p.scale;
    }
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
  if constexpr (kMultipliesTiles) return by_tiles(p, a.data(), b.data());
  const GemmOperands<BFloat16> g{a.data(),  p.depth, 2,         b.data(),
                                 p.columns, p.c,     p.columns, p.scale};
  if (p.accumulate) {
    gemm<true>(p.rows, p.columns, steps, g);
  } else {
    gemm<false>(p.rows, p.columns, steps, g);
  }
}

}  // namespace flashkern::FK_ISA
