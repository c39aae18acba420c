// Twin of csrc/ptx/global.h. A load lets others run: it may be a loop's that waits for them.
#pragma once

#include "emulator/cuda/atomics.h"
#include "ptx/core.h"

namespace flashkern::ptx {

FK_UNWATCHED int load_relaxed(const int* p, Site site = Site::current()) {
  emulator::pause("load_relaxed", site);
  emulator::on_atomic(p, sizeof(int), site, emulator::Order::kRelaxed);
  return *p;
}

FK_UNWATCHED int load_acquire(const int* p, Site site = Site::current()) {
  emulator::pause("load_acquire", site);
  emulator::on_atomic(p, sizeof(int), site, emulator::Order::kAcquire);
  return *p;
}

FK_UNWATCHED void add_release(int* p, int value, Site site = Site::current()) {
  emulator::on_atomic(p, sizeof(int), site, emulator::Order::kRelease);
  *p += value;
}

FK_UNWATCHED int add_acquire_release(int* p, int value, Site site = Site::current()) {
  emulator::on_atomic(p, sizeof(int), site, emulator::Order::kAcquireRelease);
  const int old = *p;
  *p = old + value;
  return old;
}

inline void prefetch(const void*) {}

}  // namespace flashkern::ptx
