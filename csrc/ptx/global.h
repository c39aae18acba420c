// Global memory: words by which blocks speak to each other, and what will be read.
#pragma once

#include "ptx/core.h"

namespace flashkern::ptx {

// For a loop that waits: what others have handed on is taken by a load_acquire behind it.
FK_DEVICE int load_relaxed(const int* p) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

FK_DEVICE int load_acquire(const int* p) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

// Adds, and hands on all that this thread has written or been handed.
FK_DEVICE void add_release(int* p, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

// The same, and takes what others handed on.
FK_DEVICE int add_acquire_release(int* p, int value) {
  int old;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(p), "r"(value)
               : "memory");
  return old;
}

// Brings 128 bytes into the L2 cache; nobody waits for it.
FK_DEVICE void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}

}  // namespace flashkern::ptx
