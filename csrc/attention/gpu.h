// The entry points of the GPU kernels. Every pointer in the params is the device's.
#pragma once

#include "attention/params.h"
#include "stream.h"

namespace flashkern::gpu {

// Bytes of device memory that params.workspace must have: 0 where the keys are not split.
int64_t attention_workspace(const attention::ForwardParams& params);

void attention_forward(const attention::ForwardParams& params, GpuStream stream);

// What params.workspace and params.turns must hold.
struct BackwardWorkspace {
  int64_t floats, zeros;
};
BackwardWorkspace attention_backward_workspace(const attention::BackwardParams& params);

// params.grad_bias is (batch, heads, rows, keys), none of them broadcast.
void attention_backward(const attention::BackwardParams& params, GpuStream stream);
void attention_append(const attention::AppendParams& params, GpuStream stream);

}  // namespace flashkern::gpu
