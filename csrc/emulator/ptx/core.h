// Twin of csrc/ptx/core.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "emulator/api.h"

#define FK_DEVICE inline

namespace flashkern::ptx {

using emulator::Site;

inline constexpr uint32_t kAllLanes = 0xffffffffu;

template <class Storage>
Storage& shared_storage(Site site = Site::current()) {
  return *static_cast<Storage*>(emulator::shared_memory(sizeof(Storage), alignof(Storage), site));
}

inline uint32_t shared_address(const void* p, Site site = Site::current()) {
  return emulator::shared_address(p, site);
}

template <class T>
T* opaque(T* p) {
  return p;
}

inline uint32_t thread_id() { return threadIdx.x; }
inline uint32_t lane_id() { return emulator::lane(); }
inline uint32_t warp_id() { return emulator::warp(); }

}  // namespace flashkern::ptx
