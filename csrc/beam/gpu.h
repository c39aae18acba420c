// The entry points of the GPU kernel. Every pointer in the params is the device's.
#pragma once

#include "beam/params.h"
#include "stream.h"

namespace flashkern::gpu {

// Bytes of device memory, 16-byte aligned, that a launch works in.
int64_t beam_topk_workspace(const beam::TopkParams& params);

// One launch; reads nothing back. In a captured graph, or where the device has no memory left for
// what a stream keeps, a memset goes before it.
void beam_topk(const beam::TopkParams& params, void* workspace, GpuStream stream);

}  // namespace flashkern::gpu
