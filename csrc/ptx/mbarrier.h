// mbarriers (sm_90): a count of arrivals and of bytes that asynchronous copies still owe, in 8
// bytes of shared memory. A phase ends when both are zero; wait(parity) returns once the phase of
// that parity has ended. A fresh barrier is in phase 0, so wait(barrier, 1) returns at once.
#pragma once

#include <cuda/ptx>

#include "ptx/core.h"

namespace flashkern::ptx {

// One thread initialises and fences; all meet at a barrier of the block or cluster before use.
FK_DEVICE void mbarrier_init(uint64_t* barrier, uint32_t count) {
  cuda::ptx::mbarrier_init(barrier, count);
}

FK_DEVICE void mbarrier_invalidate(uint64_t* barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

FK_DEVICE void fence_mbarrier_init() {
  cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
}

FK_DEVICE void mbarrier_arrive(uint64_t* barrier, uint32_t count = 1) {
  cuda::ptx::mbarrier_arrive(cuda::ptx::sem_release, cuda::ptx::scope_cta, cuda::ptx::space_shared,
                             barrier, count);
}

// Arrives at the same barrier of block `rank` of the cluster.
FK_DEVICE void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Announces bytes of copies to come, and arrives.
FK_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  cuda::ptx::mbarrier_arrive_expect_tx(cuda::ptx::sem_release, cuda::ptx::scope_cta,
                                       cuda::ptx::space_shared, barrier, bytes);
}

FK_DEVICE void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  cuda::ptx::mbarrier_expect_tx(cuda::ptx::sem_relaxed, cuda::ptx::scope_cta,
                                cuda::ptx::space_shared, barrier, bytes);
}

// May give up after a while: false.
FK_DEVICE bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  return cuda::ptx::mbarrier_try_wait_parity(barrier, parity);
}

FK_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// This thread's cp.async so far arrive at the barrier, once they have landed. The barrier's count
// includes these arrivals.
FK_DEVICE void copy_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

}  // namespace flashkern::ptx
