// How the operands of a tensor core lie in registers, and what their bits are worth.
#pragma once

#include <bit>
#include <cstdint>

#include "emulator/tensor_core.h"

namespace flashkern::emulator {

template <class T>
struct Layout;

template <>
struct Layout<BFloat16> {
  using Raw = uint16_t;
  static constexpr int kDepth = 16;  // k of one mma
  static float to_float(Raw bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
};

template <>
struct Layout<Half> {
  using Raw = uint16_t;
  static constexpr int kDepth = 16;
  static float to_float(Raw bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
};

template <>
struct Layout<ptx::Tf32> {  // the hardware reads 19 of the 32 bits
  using Raw = uint32_t;
  static constexpr int kDepth = 8;
  static float to_float(Raw bits) { return std::bit_cast<float>(bits & 0xffffe000u); }
};

}  // namespace flashkern::emulator
