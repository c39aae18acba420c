// Twin of csrc/ptx/barrier.h.
#pragma once

#include "ptx/core.h"

namespace flashkern::ptx {

inline void barrier_sync(int id, int threads, Site site = Site::current()) {
  emulator::block_barrier("barrier_sync", id, threads, emulator::Vote::kNone, 0, site);
}

inline void barrier_arrive(int id, int threads, Site site = Site::current()) {
  emulator::block_arrive("barrier_arrive", id, threads, site);
}

}  // namespace flashkern::ptx
