// Twin of csrc/ptx/copy.h.
#pragma once

#include "ptx/core.h"

namespace flashkern::ptx {

template <int kBytes>
void copy_async(void* shared, const void* global, Site site = Site::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulator::copy_async(shared, global, kBytes, kBytes, site);
}

template <int kBytes>
void copy_async(void* shared, const void* global, int bytes, Site site = Site::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulator::copy_async(shared, global, kBytes, bytes, site);
}

inline void copy_commit() { emulator::copy_commit(); }

template <int kGroups>
void copy_wait(Site site = Site::current()) {
  emulator::copy_wait(kGroups, site);
}

inline void copy_wait_all(Site site = Site::current()) { emulator::copy_wait(-1, site); }

}  // namespace flashkern::ptx
