// Named barriers: a block has sixteen; __syncthreads is number 0. `threads` counts all that take
// part, those that sync and those that arrive, in whole warps.
#pragma once

#include "ptx/core.h"

namespace flashkern::ptx {

FK_DEVICE void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts this warp and goes on.
FK_DEVICE void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace flashkern::ptx
