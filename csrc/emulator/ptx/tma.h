// Twin of csrc/ptx/tma.h.
#pragma once

#include "ptx/core.h"
#include "ptx/tensor_map.h"

namespace flashkern::ptx {

inline void fence_async() { emulator::fence_async(); }
inline void prefetch(const TensorMap&) {}

template <int kRank>
void tma_load(void* shared, const TensorMap& map, const int32_t (&at)[kRank], uint64_t* barrier,
              Site site = Site::current()) {
  emulator::load_tile(shared, map.tensor, at, kRank, barrier, 0, site);
}

template <int kRank>
void tma_load_multicast(void* shared, const TensorMap& map, const int32_t (&at)[kRank],
                        uint64_t* barrier, uint16_t blocks, Site site = Site::current()) {
  emulator::load_tile(shared, map.tensor, at, kRank, barrier, blocks, site);
}

template <int kRank>
void tma_store(const TensorMap& map, const int32_t (&at)[kRank], const void* shared,
               Site site = Site::current()) {
  emulator::store_tile(map.tensor, at, kRank, shared, false, site);
}

template <int kRank>
void tma_add(const TensorMap& map, const int32_t (&at)[kRank], const void* shared,
             Site site = Site::current()) {
  emulator::store_tile(map.tensor, at, kRank, shared, true, site);
}

inline void store_commit() { emulator::store_commit(); }

template <int kGroups>
void store_wait_read() {
  emulator::store_wait(kGroups, true);
}

template <int kGroups>
void store_wait() {
  emulator::store_wait(kGroups, false);
}

}  // namespace flashkern::ptx
