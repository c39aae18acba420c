// Beam top-k on a GPU of compute capability 8.0 or more.
#pragma once

#include "beam/params.h"

struct CUstream_st;

namespace flashkern {

// Bytes of workspace for this problem on the current device. Its first beam_topk_cuda_tickets(...)
// bytes must be zero before a workspace's first use; every launch leaves them zero, so that the
// same workspace serves the next launch on its stream, and each replay of a graph.
int64_t beam_topk_cuda_workspace(const beam::TopkParams& p);
int64_t beam_topk_cuda_tickets(const beam::TopkParams& p);

// One launch on `stream`; reads nothing back. workspace: 256-byte aligned. Throws
// std::runtime_error where the launch is refused.
void beam_topk_cuda(const beam::TopkParams& p, void* workspace, CUstream_st* stream);

}  // namespace flashkern
