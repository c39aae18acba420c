// A tensor in global memory as TMA sees it: made on the host, passed to the kernel as a
// `const __grid_constant__ TensorMap`.
#pragma once

#include <cuda.h>

#include "ptx/launch.h"
#include "ptx/swizzle.h"
#include "types.h"

namespace flashkern::ptx {

struct TensorMap {
  CUtensorMap map;
};

// What make_tensor_map is told. Dimension 0 is contiguous. `box`: the tile that one copy moves.
struct TensorShape {
  DType dtype;
  const void* data;    // 16-byte aligned
  int rank;            // 2 to 4
  uint64_t extent[4];  // in elements
  uint64_t stride[4];  // in bytes, multiples of 16; stride[0] is not used
  uint32_t box[4];     // at most 256 each; with a swizzle, box[0] spans swizzle_span bytes
  Swizzle swizzle;
};

inline CUtensorMapDataType tensor_map_type(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case DType::kFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case DType::kFloat32:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    default:
      throw std::runtime_error("a tensor map has no float64");
  }
}

inline CUtensorMapSwizzle tensor_map_swizzle(Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::k128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
    case Swizzle::k64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case Swizzle::k32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    default:
      return CU_TENSOR_MAP_SWIZZLE_NONE;
  }
}

// The driver's encoder, found through the runtime: nothing links to libcuda.
inline auto tensor_map_encoder() {
  static void* const function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                           cudaEnableDefault, &result),
          "cuTensorMapEncodeTiled");
    if (found == nullptr) throw std::runtime_error("the CUDA driver has no TMA: it is too old");
    return found;
  }();
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

inline TensorMap make_tensor_map(const TensorShape& shape) {
  TensorMap map;
  const cuuint32_t ones[4] = {1, 1, 1, 1};
  const CUresult result = tensor_map_encoder()(
      &map.map, tensor_map_type(shape.dtype), static_cast<cuuint32_t>(shape.rank),
      const_cast<void*>(shape.data), shape.extent, shape.stride + 1, shape.box, ones,
      CU_TENSOR_MAP_INTERLEAVE_NONE, tensor_map_swizzle(shape.swizzle),
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(result));
  }
  return map;
}

}  // namespace flashkern::ptx
