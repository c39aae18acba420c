// The two loops that find a CPU's limits: multiply-adds that touch no memory, and reads that do
// nothing else. Each runs on the calling thread; csrc/host/roof.cpp runs them on many at once.
#pragma once

#include <cstdint>

#include "simd/isa.h"

namespace flashkern {

struct FmaParams {
  int64_t rounds;  // of kFmaChains vector multiply-adds
  float* sink;     // one float: keeps the compiler from dropping the loop
  bool pairs;      // of bfloat16 pairs, in lanes or in tiles, where the ISA has them
};

struct ReadParams {
  const float* data;
  int64_t count;    // floats, a multiple of 128
  int64_t repeats;  // passes over data
  float* sink;
};

// Twelve independent chains cover a latency of up to six cycles at two multiply-adds a cycle and,
// with the two factors, fit AVX2's 16 registers.
inline constexpr int kFmaChains = 12;

// Independent sums of tile products: four would cover their latency of 52 cycles.
inline constexpr int kPeakTiles = 6;
inline constexpr double kFlopsOfTile = 2 * 16 * 16 * 32;

}  // namespace flashkern

namespace flashkern {
FK_TILE_KERNEL(fma_loop, FmaParams)
FK_CPU_KERNEL(read_loop, ReadParams)
}  // namespace flashkern
