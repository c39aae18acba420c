// Twin of csrc/ptx/cluster.h.
#pragma once

#include "ptx/core.h"

namespace flashkern::ptx {

inline uint32_t cluster_rank() { return emulator::cluster_rank(); }
inline uint32_t cluster_size() { return emulator::cluster_size(); }

inline void cluster_arrive(Site site = Site::current()) { emulator::cluster_arrive(site); }
inline void cluster_wait(Site site = Site::current()) { emulator::cluster_wait(site); }
inline void cluster_sync(Site site = Site::current()) {
  emulator::cluster_arrive(site);
  emulator::cluster_wait(site);
}

template <class T>
T* in_cluster(T* shared, uint32_t rank, Site site = Site::current()) {
  return static_cast<T*>(emulator::in_cluster(shared, rank, site));
}

inline bool elect_one(Site site = Site::current()) {
  emulator::gather("elect_one", emulator::Collective::kAligned, kAllLanes, nullptr, nullptr, site);
  return emulator::lane() == 0;
}

template <int kRegisters>
void give_registers(Site site = Site::current()) {
  emulator::set_registers(kRegisters, false, site);
}
template <int kRegisters>
void take_registers(Site site = Site::current()) {
  emulator::set_registers(kRegisters, true, site);
}

}  // namespace flashkern::ptx
