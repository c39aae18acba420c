// The SIMD vocabulary laid open for tests: each function of csrc/simd applied to a run of numbers,
// in every ISA. Only flashkern._host holds it.
#pragma once

#include <cstdint>

#include "simd/isa.h"

namespace flashkern {

enum class SimdFunction { kExp, kExp2BelowZero, kTanh, kBFloat16, kHalf };

// out[i] = function(in[i]); the two storage types are rounded to and widened again.
struct SimdMapParams {
  SimdFunction function;
  const float* in;
  float* out;
  int64_t count;
};

struct SimdPhiloxParams {
  uint64_t key;
  int64_t begin, count;  // columns; out has room for count rounded up to 64
  uint32_t c1, c2, c3;
  uint32_t* out;
};

struct SimdGemmParams {
  int64_t rows, columns, depth;
  const float* a;
  int64_t a_row, a_col;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
  bool accumulate;
};

// C (+)= scale A B on A and B rounded to bfloat16, multiplied in pairs. A and B are row-major.
struct SimdPairsParams {
  int64_t rows, columns, depth;  // depth is even
  const float *a, *b;
  float* c;
  float scale;
  bool accumulate;
};

FK_CPU_KERNEL(simd_map, SimdMapParams)
FK_CPU_KERNEL(simd_philox, SimdPhiloxParams)
FK_CPU_KERNEL(simd_gemm, SimdGemmParams)
FK_TILE_KERNEL(simd_pairs, SimdPairsParams)

}  // namespace flashkern
