// The entry points of the GPU kernels. Every pointer in the params is the device's.
#pragma once

#include "attention/params.h"
#include "stream.h"

namespace flashkern::gpu {

void attention_forward(const attention::ForwardParams& params, GpuStream stream);

}  // namespace flashkern::gpu
