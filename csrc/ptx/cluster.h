// Blocks of a cluster (sm_90): their barrier, their ranks, each other's shared memory; and the
// registers that warps of one block pass to each other.
#pragma once

#include <cuda/ptx>

#include "ptx/core.h"

namespace flashkern::ptx {

FK_DEVICE uint32_t cluster_rank() { return cuda::ptx::get_sreg_cluster_ctarank(); }
FK_DEVICE uint32_t cluster_size() { return cuda::ptx::get_sreg_cluster_nctarank(); }

FK_DEVICE void cluster_arrive() { cuda::ptx::barrier_cluster_arrive(cuda::ptx::sem_release); }
FK_DEVICE void cluster_wait() { cuda::ptx::barrier_cluster_wait(cuda::ptx::sem_acquire); }
FK_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// The same variable in the shared memory of block `rank`.
template <class T>
FK_DEVICE T* in_cluster(T* shared, uint32_t rank) {
  uint64_t remote;
  asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(shared), "r"(rank));
  return reinterpret_cast<T*>(remote);
}

// One lane of a converged warp, the same at every call.
FK_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}

// setmaxnreg: all warps of a warpgroup call it. A producer gives registers back, consumers take
// them; the kernel is compiled with __launch_bounds__ so that its own count is known.
template <int kRegisters>
FK_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FK_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace flashkern::ptx
