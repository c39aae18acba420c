// Twin of csrc/ptx/matrix.h.
#pragma once

#include "emulator/tensor_core.h"
#include "ptx/core.h"

namespace flashkern::ptx {

template <int N>
void ldmatrix(uint32_t (&d)[N], const void* row, Site site = Site::current()) {
  static_assert(N == 1 || N == 2 || N == 4);
  emulator::load_matrices(d, N, row, false, site);
}

template <int N>
void ldmatrix_trans(uint32_t (&d)[N], const void* row, Site site = Site::current()) {
  static_assert(N == 1 || N == 2 || N == 4);
  emulator::load_matrices(d, N, row, true, site);
}

inline void ldmatrix(uint32_t (&d)[4], uint32_t row, Site site = Site::current()) {
  emulator::load_matrices(d, 4, emulator::shared_pointer(row, 16, "ldmatrix", site), false, site);
}

inline void ldmatrix_trans(uint32_t (&d)[4], uint32_t row, Site site = Site::current()) {
  emulator::load_matrices(d, 4, emulator::shared_pointer(row, 16, "ldmatrix", site), true, site);
}

template <int N>
void stmatrix(void* row, const uint32_t (&s)[N], Site site = Site::current()) {
  static_assert(N == 1 || N == 2 || N == 4);
  emulator::store_matrices(row, N, s, false, site);
}

template <int N>
void stmatrix_trans(void* row, const uint32_t (&s)[N], Site site = Site::current()) {
  static_assert(N == 1 || N == 2 || N == 4);
  emulator::store_matrices(row, N, s, true, site);
}

}  // namespace flashkern::ptx
