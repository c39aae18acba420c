// The twin of <cuda_runtime.h>: first on the include path when a .cu file is compiled as C++.
// It holds what the kernels and launchers use, no more: a missing name is a line to add here.
//
// __shared__ is for scalars and small arrays of one block's own: plain statics that the emulator
// cannot poison, guard or give to each block of a cluster. Kernels take their memory from
// ptx::shared_storage.
#pragma once

#include "emulator/cuda/atomics.h"
#include "emulator/cuda/intrinsics.h"
#include "emulator/cuda/runtime.h"
#include "emulator/cuda/vectors.h"
#include "emulator/cuda/warp.h"

#define FK_EMULATED 1

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;
