// The stream that a GPU launcher works on, without a CUDA header: cudaStream_t by another name.
#pragma once

struct CUstream_st;

namespace flashkern {

using GpuStream = CUstream_st*;

}  // namespace flashkern
