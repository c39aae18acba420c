// LoRA on NVIDIA GPUs from sm_80 on: what the adapters in csrc/torch/ call. The params are the CPU's
// (lora/params.h); every pointer is one of the device but for `scale` where there are no ids: that
// one is read here. With ids, `scale` lies on the device, one number for each adapter.
//
// A launch needs a workspace of as many bytes as the plan says, 256-byte aligned, not initialised.
// Nothing here synchronises or reads the device's memory: a CUDA graph may capture it.
#pragma once

#include <cuda_runtime.h>

#include "lora/params.h"
#include "lora/sm80/plan.h"

namespace flashkern::sm80 {

// base: kBlas: y (dx) holds x W^T + bias (dy W) already; anything else: computed here.
void lora_forward(const LoraForward& p, void* workspace, cudaStream_t stream);
void lora_backward(const LoraBackward& p, void* workspace, cudaStream_t stream);

}  // namespace flashkern::sm80
