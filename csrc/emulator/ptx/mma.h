// Twin of csrc/ptx/mma.h.
#pragma once

#include "emulator/tensor_core.h"
#include "ptx/convert.h"
#include "ptx/core.h"

namespace flashkern::ptx {

template <class T, int N>
void mma_strip(float (&d)[N][4], const uint32_t (&a)[4], const uint32_t (&b)[N][2],
               Site site = Site::current()) {
  emulator::multiply(emulator::kElement<T>, N, &d[0][0], a, &b[0][0], site);
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         Site site = Site::current()) {
  emulator::multiply(emulator::kElement<T>, 1, d, a, b, site);
}

}  // namespace flashkern::ptx
