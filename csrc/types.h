// The element types that every kernel knows. bfloat16 and float16 are storage only: arithmetic is
// float32.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FK_HOST_DEVICE __host__ __device__
#else
#define FK_HOST_DEVICE
#endif

namespace flashkern {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

}  // namespace flashkern
