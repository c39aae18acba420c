// The vocabulary's ground: what every kernel file includes first.
//
// csrc/ptx/ is what the kernels know of the GPU, and the only place with inline assembly. Each
// header has a twin of the same name in csrc/emulator/ptx/, found first where a .cu file is
// compiled as C++: a kernel's source never asks which one it got. Headers without a twin
// (swizzle.h, descriptor.h) are plain arithmetic, the same on both sides.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define FK_DEVICE __device__ __forceinline__

namespace flashkern::ptx {

inline constexpr uint32_t kAllLanes = 0xffffffffu;

// The block's dynamic shared memory as one struct: its size is the kernel's budget, written once.
// Its start is a multiple of 1024, as the 128-byte swizzle needs.
template <class Storage>
FK_DEVICE Storage& shared_storage() {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  return *reinterpret_cast<Storage*>(shared_bytes);
}

// Where p lies in the shared window: what descriptors and 32-bit addresses are made of.
FK_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The same pointer, of which the compiler knows nothing more: what is added to it step by step is
// not turned into products.
template <class T>
FK_DEVICE T* opaque(T* p) {
  asm("" : "+l"(p));
  return p;
}

// threadIdx.x, read anew at each use: nothing that follows from it keeps registers in between.
FK_DEVICE uint32_t thread_id() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

FK_DEVICE uint32_t lane_id() {
  uint32_t lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// The warp's number in a block whose threads are numbered along x; the same for all its lanes,
// which the compiler then knows.
FK_DEVICE uint32_t warp_id() { return __shfl_sync(kAllLanes, threadIdx.x / 32, 0); }

}  // namespace flashkern::ptx
