// Twin of csrc/ptx/wgmma.h.
#pragma once

#include "emulator/wgmma.h"
#include "ptx/core.h"
#include "ptx/descriptor.h"
#include "types.h"

namespace flashkern::ptx {

inline void wgmma_fence(Site site = Site::current()) { emulator::wgmma_fence(site); }
inline void wgmma_commit(Site site = Site::current()) { emulator::wgmma_commit(site); }

template <int kGroups>
void wgmma_wait(Site site = Site::current()) {
  emulator::wgmma_wait(kGroups, site);
}

template <int N>
void pin(float (&)[N]) {}

template <class T, Major kA = Major::kK, Major kB = Major::kK, int R>
void wgmma(float (&d)[R], uint64_t a, uint64_t b, bool keep, Site site = Site::current()) {
  static_assert(R == 4 || (R % 8 == 0 && R <= 128), "N is 8 or a multiple of 16 up to 256");
  emulator::wgmma(emulator::kElement<T>, R * 2, d, nullptr, {a, kA == Major::kMN},
                  {b, kB == Major::kMN}, keep, site);
}

template <class T, Major kB = Major::kK, int R>
void wgmma(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool keep,
           Site site = Site::current()) {
  static_assert(R == 4 || (R % 8 == 0 && R <= 128), "N is 8 or a multiple of 16 up to 256");
  emulator::wgmma(emulator::kElement<T>, R * 2, d, a, {}, {b, kB == Major::kMN}, keep, site);
}

}  // namespace flashkern::ptx
