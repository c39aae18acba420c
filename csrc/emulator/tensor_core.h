// ldmatrix, stmatrix and mma.sync: what the twin's headers call.
#pragma once

#include <cstdint>

#include "emulator/api.h"
#include "types.h"

namespace flashkern::ptx {
struct Tf32;
}

namespace flashkern::emulator {

enum class Element { kBFloat16, kHalf, kTf32 };

template <class T>
inline constexpr Element kElement = T::no_such_element;
template <>
inline constexpr Element kElement<BFloat16> = Element::kBFloat16;
template <>
inline constexpr Element kElement<Half> = Element::kHalf;
template <>
inline constexpr Element kElement<ptx::Tf32> = Element::kTf32;

void load_matrices(uint32_t* d, int n, const void* row, bool transposed, const Site& site);
void store_matrices(void* row, int n, const uint32_t* s, bool transposed, const Site& site);

// D += A B, n products of 8 columns each: d[4 n], a[4], b[2 n] are the lane's registers.
void multiply(Element element, int n, float* d, const uint32_t* a, const uint32_t* b,
              const Site& site);

}  // namespace flashkern::emulator
