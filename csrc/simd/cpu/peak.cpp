// The loops behind the roofs of the benchmarks (simd/peak.h).
//
// fma_loop   kFmaChains accumulators in registers, each updated once in a round: x = x a + b. No
// load
//            and no store inside; its rate is what the vector units can do. a < 1 keeps x finite.
// read_loop  sums an array with eight accumulators, so that the loop waits for memory and never for
//            an addition. Its rate is what a kernel that reads each byte once can reach.
#include "simd/peak.h"

#include "simd/tile.h"

namespace flashkern::FK_ISA {

template <bool kPairs>
void multiply_loop(const FmaParams& p) {
  VecF chains[kFmaChains];
  for (int i = 0; i < kFmaChains; ++i) chains[i] = broadcast(1.0f + static_cast<float>(i));
  const VecF a = broadcast(0.999f);
  const VecF b = broadcast(0.001f);
  for (int64_t round = 0; round < p.rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kFmaChains; ++i) {
      chains[i] = kPairs ? multiply_pairs(a, b, chains[i]) : fma(chains[i], a, b);
    }
  }
  float sum = 0.0f;
  for (const VecF& chain : chains) sum += reduce_add(chain);
  *p.sink = sum;
}

// Zeros: they take as long as any numbers.
void tile_loop(const FmaParams& p) {
  const TileScope tiles;
  unrolled<kTiles>([](auto t) { tile_zero<t>(); });
  for (int64_t round = 0; round < p.rounds; ++round) {
    unrolled<kPeakTiles>([](auto t) { tile_multiply<t, kPeakTiles, kPeakTiles + 1>(); });
  }
  *p.sink = 0;
}

void fma_loop(const FmaParams& p, const Threads&) {
  if constexpr (kMultipliesTiles) {
    if (p.pairs) return tile_loop(p);
  }
  p.pairs&& kMultipliesPairs ? multiply_loop<kMultipliesPairs>(p) : multiply_loop<false>(p);
}

void read_loop(const ReadParams& p, const Threads&) {
  constexpr int kSums = 8;
  VecF sums[kSums] = {};
  for (int64_t pass = 0; pass < p.repeats; ++pass) {
    for (int64_t at = 0; at < p.count; at += kSums * kLanes) {
#pragma GCC unroll 8
      for (int i = 0; i < kSums; ++i) sums[i] += load(p.data + at + i * kLanes);
    }
    asm volatile("" ::: "memory");  // every pass reads again
  }
  VecF total{};
  for (const VecF& sum : sums) total += sum;
  *p.sink = reduce_add(total);
}

}  // namespace flashkern::FK_ISA
