// What every adapter needs of a stable-ABI tensor. Adapters check, fill params and call; no
// arithmetic.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <optional>
#include <span>
#include <vector>

#include "types.h"

namespace flashkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, "dtype must be float32, bfloat16, float16 or float64");
  }
}

inline const void* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

// A new tensor on the device of `like`, uninitialised. One call of torch's C interface:
// torch::stable::new_empty looks its operator up by name and boxes six arguments, which a decode
// step pays thirty times.
inline Tensor empty_strided(const Tensor& like, std::span<const int64_t> sizes,
                            std::span<const int64_t> strides, ScalarType dtype) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  AtenTensorHandle tensor;
  const bool gpu = like.is_cuda();
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), to<int32_t>(from(dtype)),
      gpu ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(),
      gpu ? like.get_device_index() : 0, &tensor));
  return Tensor(tensor);
}

inline Tensor empty(const Tensor& like, std::span<const int64_t> sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t elements = 1;
  for (size_t i = sizes.size(); i-- > 0; elements *= std::max<int64_t>(sizes[i], 1)) {
    strides[i] = elements;
  }
  return empty_strided(like, sizes, strides, dtype);
}

// For lists in braces: empty<2>(like, {rows, columns}, dtype).
template <size_t N>
Tensor empty_strided(const Tensor& like, const std::array<int64_t, N>& sizes,
                     const std::array<int64_t, N>& strides, ScalarType dtype) {
  return empty_strided(like, std::span<const int64_t>(sizes), std::span<const int64_t>(strides),
                       dtype);
}
template <size_t N>
Tensor empty(const Tensor& like, const std::array<int64_t, N>& sizes, ScalarType dtype) {
  return empty(like, std::span<const int64_t>(sizes), dtype);
}

}  // namespace flashkern
