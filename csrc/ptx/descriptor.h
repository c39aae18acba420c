// A wgmma operand in shared memory, told to the hardware in 64 bits. See the PTX ISA, "Matrix
// descriptor", and "Strides".
//
// An operand is cut along K into steps of 16 elements (one wgmma each). With a swizzle:
//
//   K-major   a row holds swizzle_span bytes of K; 8 rows are an atom, `stride` bytes from one atom
//             to the next along M or N. `leading` is not used. The next K step within the span is
//             32 bytes further: add 32 to the address.
//   MN-major  a row holds swizzle_span bytes of M or N; 8 rows (of K) are an atom, `stride` bytes
//             from one to the next along K, `leading` bytes along M or N.
//
// Without a swizzle an atom is 8 rows of 16 bytes, packed; K-major: `leading` bytes between the two
// atoms of a K step, `stride` along M or N. MN-major: the other way round.
#pragma once

#include "ptx/swizzle.h"

namespace flashkern::ptx {

enum class Major : uint32_t { kK = 0, kMN = 1 };

// `address`: of shared memory, a multiple of 16 that begins at the start of the swizzle's pattern
// plus the K step. Offsets are multiples of 16 below 2^18.
__host__ __device__ constexpr uint64_t matrix_descriptor(uint32_t address, Swizzle swizzle,
                                                         uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) |
         static_cast<uint64_t>((leading & 0x3ffff) >> 4) << 16 |
         static_cast<uint64_t>((stride & 0x3ffff) >> 4) << 32 |
         static_cast<uint64_t>(swizzle) << 62;
}

// The same operand, `bytes` further.
__host__ __device__ constexpr uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

}  // namespace flashkern::ptx
