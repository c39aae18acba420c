// TMA (sm_90): one thread moves a whole tile between global and shared memory. Loads complete at an
// mbarrier, which must expect the box's bytes; what lies outside the tensor arrives as zeros, and
// counts. Stores complete in groups, as cp.async does; they write only what lies inside.
//
// Generic code and TMA see shared memory through different proxies: after ordinary stores that TMA
// (or wgmma) is to read, each writer calls fence_async() before the barrier.
#pragma once

#include <cuda/ptx>

#include "ptx/core.h"
#include "ptx/tensor_map.h"

namespace flashkern::ptx {

FK_DEVICE void fence_async() { cuda::ptx::fence_proxy_async(cuda::ptx::space_shared); }

FK_DEVICE void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The box whose first element is at `at` (innermost first), to `shared`: 128-byte aligned, or as
// the swizzle asks.
template <int kRank>
FK_DEVICE void tma_load(void* shared, const TensorMap& map, const int32_t (&at)[kRank],
                        uint64_t* barrier) {
  cuda::ptx::cp_async_bulk_tensor(cuda::ptx::space_cluster, cuda::ptx::space_global, shared, &map,
                                  at, barrier);
}

// To the same place in every block of the cluster whose bit is set; each one's barrier is told.
template <int kRank>
FK_DEVICE void tma_load_multicast(void* shared, const TensorMap& map, const int32_t (&at)[kRank],
                                  uint64_t* barrier, uint16_t blocks) {
  cuda::ptx::cp_async_bulk_tensor(cuda::ptx::space_cluster, cuda::ptx::space_global, shared, &map,
                                  at, barrier, blocks);
}

template <int kRank>
FK_DEVICE void tma_store(const TensorMap& map, const int32_t (&at)[kRank], const void* shared) {
  cuda::ptx::cp_async_bulk_tensor(cuda::ptx::space_global, cuda::ptx::space_shared, &map, at,
                                  shared);
}

// Adds the box to what is there, element by element.
template <int kRank>
FK_DEVICE void tma_add(const TensorMap& map, const int32_t (&at)[kRank], const void* shared) {
  cuda::ptx::cp_reduce_async_bulk_tensor(cuda::ptx::space_global, cuda::ptx::space_shared,
                                         cuda::ptx::op_add, &map, at, shared);
}

FK_DEVICE void store_commit() { cuda::ptx::cp_async_bulk_commit_group(); }

// Until at most kGroups of this thread's latest groups still read shared memory.
template <int kGroups>
FK_DEVICE void store_wait_read() {
  cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<kGroups>{});
}

// Until at most kGroups are not yet visible in global memory.
template <int kGroups>
FK_DEVICE void store_wait() {
  cuda::ptx::cp_async_bulk_wait_group(cuda::ptx::n32_t<kGroups>{});
}

}  // namespace flashkern::ptx
