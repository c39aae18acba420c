// Intel's AMX: eight registers of 16 rows of 64 bytes, and one instruction that multiplies them.
//
//   C (16 x 16 float32)  +=  A (16 x 32 bfloat16)  B (32 x 16 bfloat16)
//
// A lies row by row. A row of B holds pairs of neighbours of the sum, as everywhere in csrc/simd:
// B[k][n] = (b[2k][n], b[2k + 1][n]). 16384 FLOPs in 16 cycles, after 52.
//
// The assembler knows the instructions whatever the compiler's flags, so the vocabulary is inline
// assembly. Without AMX the tiles are arrays: FLASHKERN_PORTABLE_TILES tests the kernels with them.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd/vec.h"

namespace flashkern::FK_ISA {

#if defined(FK_TILES)
inline constexpr bool kMultipliesTiles = true;
#else
inline constexpr bool kMultipliesTiles = false;
#endif

inline constexpr int kTileSide = 16;   // rows, and floats or pairs in a row
inline constexpr int kTileDepth = 32;  // terms of a sum
inline constexpr int kTileBytes = 64;  // of a row
inline constexpr int kTiles = 8;
static_assert(!kMultipliesTiles || kLanes == kTileSide);

struct Nothing {};  // in place of a TileScope where no tiles are

#if defined(FK_TILES_ALONE)

// A thread's tiles are there while one of these is. Others in the process (oneDNN) shape them too,
// so that nobody counts on what a thread had before.
class TileScope {
 public:
  TileScope() {
    alignas(64) uint8_t shape[64] = {1};  // palette 1
    for (int t = 0; t < kTiles; ++t) {
      shape[16 + 2 * t] = kTileBytes;
      shape[48 + t] = kTileSide;
    }
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~TileScope() { asm volatile("tilerelease"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

template <int kTile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// Strides are bytes.
template <int kTile>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

#else

using Tile = float[kTileSide][kTileSide];

struct TileScope {
  TileScope() { std::memset(tiles(), 0xff, sizeof(Tile) * kTiles); }  // NaN: nothing is there yet
  ~TileScope() { std::memset(tiles(), 0xff, sizeof(Tile) * kTiles); }
  static Tile* tiles() {
    thread_local Tile tile[kTiles];
    return tile;
  }
};

template <int kTile>
inline void tile_zero() {
  std::memset(TileScope::tiles()[kTile], 0, sizeof(Tile));
}
template <int kTile>
inline void tile_load(const void* from, int64_t stride) {
  for (int i = 0; i < kTileSide; ++i) {
    std::memcpy(TileScope::tiles()[kTile][i], static_cast<const char*>(from) + i * stride,
                kTileBytes);
  }
}
template <int kTile>
inline void tile_store(void* to, int64_t stride) {
  for (int i = 0; i < kTileSide; ++i) {
    std::memcpy(static_cast<char*>(to) + i * stride, TileScope::tiles()[kTile][i], kTileBytes);
  }
}
template <int kC, int kA, int kB>
inline void tile_multiply() {
  Tile *c = &TileScope::tiles()[kC], *a = &TileScope::tiles()[kA], *b = &TileScope::tiles()[kB];
  for (int m = 0; m < kTileSide; ++m) {
    for (int k = 0; k < kTileSide; ++k) {
      BFloat16Pair x;
      std::memcpy(&x, &(*a)[m][k], sizeof x);
      for (int n = 0; n < kTileSide; n += kLanes) {
        float* to = (*c)[m] + n;
        store(to, multiply_pairs(broadcast(x), load((*b)[k] + n), load(to)));
      }
    }
  }
}

#endif

}  // namespace flashkern::FK_ISA
