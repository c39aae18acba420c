// cp.async: global to shared memory behind the thread's back. A thread's copies land when it waits
// for their group; other threads see them after a barrier that follows that wait.
#pragma once

#include "ptx/core.h"

namespace flashkern::ptx {

// kBytes is 4, 8 or 16: both addresses are multiples of it. 16 bypasses L1.
template <int kBytes>
FK_DEVICE void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(shared)),
                 "l"(global)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(kBytes)
                 : "memory");
  }
}

// The first `bytes` come from memory, the rest are zeros; with 0, `global` is not read.
template <int kBytes>
FK_DEVICE void copy_async(void* shared, const void* global, int bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {
    asm volatile(
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
        "l"(global), "r"(bytes)
        : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}

// Closes the group of the copies since the last commit (perhaps none).
FK_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kGroups of the latest groups are under way.
template <int kGroups>
FK_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// For all copies, committed or not.
FK_DEVICE void copy_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace flashkern::ptx
