// wgmma (sm_90a): a warpgroup multiplies 64 x 16 by 16 x N behind its own back, float32 sums.
//
//   wgmma_fence();                      registers and shared memory are as I want them
//   wgmma<BFloat16>(d, a, b, keep);     d = a b + (keep ? d : 0); once per K step, asynchronous
//   wgmma_commit();  wgmma_wait<0>();   nobody touches d, or A's registers, before this
//
// N = 8 or a multiple of 16 up to 256: twice the registers of d. Lane layout: warp w, g = lane / 4,
// t = lane % 4 holds in d[4 j + i] the element (16 w + g + 8 (i / 2), 8 j + 2 t + i % 2). A comes
// from shared memory (a descriptor) or from registers, laid out as mma's.
#pragma once

#include "ptx/core.h"
#include "ptx/descriptor.h"
#include "types.h"

namespace flashkern::ptx {

FK_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FK_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kGroups>
FK_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// Keeps the compiler from moving what it does with these registers across this point.
template <int N>
FK_DEVICE void pin(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// A, B: how the operands lie in shared memory (A only where it does).
template <class T, Major kA = Major::kK, Major kB = Major::kK, int R>
FK_DEVICE void wgmma(float (&d)[R], uint64_t a, uint64_t b, bool keep);

template <class T, Major kB = Major::kK, int R>
FK_DEVICE void wgmma(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool keep);

}  // namespace flashkern::ptx

#include "ptx/wgmma_shapes.h"
