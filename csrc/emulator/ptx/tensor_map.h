// Twin of csrc/ptx/tensor_map.h: the map holds the shape itself, checked as the driver checks it.
#pragma once

#include "emulator/tma.h"
#include "ptx/launch.h"
#include "ptx/swizzle.h"
#include "types.h"

namespace flashkern::ptx {

struct TensorShape {
  DType dtype;
  const void* data;
  int rank;
  uint64_t extent[4];
  uint64_t stride[4];
  uint32_t box[4];
  Swizzle swizzle;
};

struct alignas(64) TensorMap {
  emulator::Tensor tensor;
};

inline TensorMap make_tensor_map(const TensorShape& shape) {
  emulator::Tensor tensor;
  tensor.data = static_cast<char*>(const_cast<void*>(shape.data));
  tensor.dtype = shape.dtype;
  tensor.rank = shape.rank;
  for (int i = 0; i < 4 && i < shape.rank; ++i) {
    tensor.extent[i] = shape.extent[i];
    tensor.stride[i] = i == 0 ? 0 : shape.stride[i];
    tensor.box[i] = shape.box[i];
  }
  tensor.span = swizzle_span(shape.swizzle);
  emulator::check_tensor(tensor);
  return {tensor};
}

}  // namespace flashkern::ptx
