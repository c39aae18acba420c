// The entry points of the GPU kernel. Every pointer in the params is the device's.
#pragma once

#include "beam/params.h"
#include "stream.h"

namespace flashkern::gpu {

struct TopkWorkspace {
  int64_t bytes = 0;         // of device memory, 16-byte aligned
  int64_t ticket_bytes = 0;  // so many of them, from the start, are zero before the first launch
};

TopkWorkspace beam_topk_workspace(const beam::TopkParams& params);

// One launch; reads nothing back. It leaves the tickets zero, so that the same workspace serves the
// next launch on its stream and every replay of a graph.
void beam_topk(const beam::TopkParams& params, void* workspace, GpuStream stream);

}  // namespace flashkern::gpu
