// The kernels behind lora_forward and lora_backward, one launcher for each .cu file.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "lora/sm80/common.h"
#include "lora/sm80/plan.h"

namespace flashkern::sm80 {

// Calls fn with a null pointer of the element type.
template <class Fn>
void for_dtype(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kFloat32:
      return fn(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return fn(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return fn(static_cast<Half*>(nullptr));
    case DType::kFloat64:
      throw std::invalid_argument("lora_linear: float64 has no CUDA kernels");
  }
}

// Calls fn with the columns of the rank that a block of a narrow kernel takes.
template <class Fn>
void for_ranks(int64_t rank, Fn&& fn) {
  switch (narrow_ranks(rank)) {
    case 16:
      return fn(std::integral_constant<int, 16>());
    case 32:
      return fn(std::integral_constant<int, 32>());
    default:
      return fn(std::integral_constant<int, 64>());
  }
}

inline bool aligned(const void* p, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && row_bytes % 16 == 0;
}

// order.cu: fills `order` (rows) and `starts` (count + 1).
void sort_rows(const int64_t* ids, int64_t rows, int64_t count, int* order, int* starts,
               cudaStream_t stream);

// shrink.cu: out = scale * keep(left) right^T, (rows, rank) float32; zeros without an adapter. One
// launch.
struct ShrinkParams {
  int64_t rows, depth;
  DType dtype;
  const void* left;
  int64_t left_row;
  Factor right;  // i: rank
  int rank;
  float* out;
  float scale;
  const double* scales;  // on the device, for each adapter; null: `scale` is meant
  RowOrder order;
  Keep keep;
};
void shrink(const ShrinkParams& p, void* workspace, cudaStream_t stream);

// gradient.cu: out = left^T right for each adapter, (width, rank) or, transposed, (rank, width).
struct GradientParams {
  int64_t rows, width, adapters;
  DType dtype;
  const void* left;  // (rows, width), with zeros where dropout drops
  int64_t left_row;
  const float* right;  // (rows, rank)
  int rank;
  void* out;
  DType out_dtype;
  bool transposed;
  RowOrder order;
  Keep keep;
};
void gradient(const GradientParams& p, void* workspace, cudaStream_t stream);

// parts.cu: out[i] = sum over k of parts[k, i].
void add_parts(const float* parts, int64_t count, int64_t size, void* out, DType dtype,
               cudaStream_t stream);

// product.cu, product_float.cu: out = left op(weight) + bias + keep(low factor^T).
struct ProductParams {
  int64_t rows, columns, depth;  // depth 0: no base product
  DType dtype;
  const void* left;
  int64_t left_row;
  const void* weight;
  bool transposed;  // weight is (columns, depth), as in x W^T; else (depth, columns), as in dy W
  const void* bias;
  void* out;
  const float* low;
  Factor factor;  // i: columns
  int rank;
  RowOrder order;
  Keep keep;
};
void product(const ProductParams& p, cudaStream_t stream);        // 16-bit
void product_float(const ProductParams& p, cudaStream_t stream);  // float32

// decode.cu: y = x W^T + bias + h B^T for few rows, and h = scale * x A^T unless it is there
// already.
struct DecodeParams {
  int rows;
  int64_t in, out;
  DType dtype;
  const void* x;
  int64_t x_row;
  const void *weight, *bias;
  void* y;
  float* h;
  Factor a, b;  // i: rank; i: out
  int rank;
  float scale;
  bool shrinks;        // h is computed here; else it is read
  const int64_t* ids;  // of the rows' adapters, or null
  int count;           // adapters
};
void decode(const DecodeParams& p, cudaStream_t stream);

}  // namespace flashkern::sm80
