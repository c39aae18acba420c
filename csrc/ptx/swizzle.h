// How TMA and wgmma permute the 16-byte chunks of shared memory so that neither rows nor columns
// meet the same banks: bits 4.. of the address are turned by bits 7.. of it. The pattern repeats
// every 1024 bytes (128 B), 512 (64 B) or 256 (32 B), so tiles start at multiples of that.
#pragma once

#include <cstdint>

#include "ptx/core.h"

namespace flashkern::ptx {

enum class Swizzle : uint32_t { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };  // as descriptors say it

// Bytes of a row that the pattern spans: the inner extent of a TMA box.
__host__ __device__ constexpr uint32_t swizzle_span(Swizzle swizzle) {
  return swizzle == Swizzle::kNone ? 16 : 256u >> static_cast<uint32_t>(swizzle);
}

// Where the byte at `offset` of an unswizzled tile lies; the tile's start is aligned as above.
template <Swizzle kSwizzle>
__host__ __device__ constexpr uint32_t swizzled(uint32_t offset) {
  return offset ^ (offset >> 3 & (swizzle_span(kSwizzle) - 16));
}

}  // namespace flashkern::ptx
