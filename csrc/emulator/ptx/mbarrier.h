// Twin of csrc/ptx/mbarrier.h.
#pragma once

#include "ptx/core.h"

namespace flashkern::ptx {

inline void mbarrier_init(uint64_t* barrier, uint32_t count, Site site = Site::current()) {
  emulator::mbarrier_init(barrier, count, site);
}

inline void mbarrier_invalidate(uint64_t* barrier, Site site = Site::current()) {
  emulator::mbarrier_invalidate(barrier, site);
}

inline void fence_mbarrier_init() { emulator::fence(); }

inline void mbarrier_arrive(uint64_t* barrier, uint32_t count = 1, Site site = Site::current()) {
  emulator::mbarrier_arrive(barrier, count, site);
}

inline void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank, Site site = Site::current()) {
  auto* remote = static_cast<uint64_t*>(emulator::in_cluster(barrier, rank, site));
  emulator::mbarrier_arrive(remote, 1, site);
}

inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes, Site site = Site::current()) {
  emulator::mbarrier_expect(barrier, bytes, true, site);
}

inline void mbarrier_expect(uint64_t* barrier, uint32_t bytes, Site site = Site::current()) {
  emulator::mbarrier_expect(barrier, bytes, false, site);
}

inline bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity, Site site = Site::current()) {
  return emulator::mbarrier_try(barrier, parity, site);
}

inline void mbarrier_wait(uint64_t* barrier, uint32_t parity, Site site = Site::current()) {
  emulator::mbarrier_wait(barrier, parity, site);
}

inline void copy_arrive(uint64_t* barrier, Site site = Site::current()) {
  emulator::copy_arrive(barrier, site);
}

}  // namespace flashkern::ptx
