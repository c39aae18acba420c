// The entry points of the GPU kernels. The params are the CPU's; every pointer in them is the
// device's but `scale` where there are no ids: that one is read here. With ids, `scale` lies on
// the device, one number for each adapter, with dropout's 1 / (1 - p) in it.
//
// A launch neither reads the device's memory nor waits for it: a CUDA graph may capture it.
#pragma once

#include "lora/params.h"
#include "stream.h"

namespace flashkern::gpu {

// Ten times the major number plus the minor one, asked for once for each device.
int compute_capability(int device);

// Bytes of device memory, aligned to 256, that a launch works in.
int64_t lora_workspace(const LoraForward& params);
int64_t lora_workspace(const LoraBackward& params);

// base: kBlas: y (dx) gets all but the base product, and the caller has BLAS add x W^T (dy W) to it
// (lora/sm80/plan.h).
void lora_forward(const LoraForward& params, void* workspace, GpuStream stream);
void lora_backward(const LoraBackward& params, void* workspace, GpuStream stream);

}  // namespace flashkern::gpu
