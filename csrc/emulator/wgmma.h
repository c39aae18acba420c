// wgmma: what the twin's header calls.
#pragma once

#include "emulator/tensor_core.h"

namespace flashkern::emulator {

struct Operand {  // in shared memory
  uint64_t descriptor = 0;
  bool mn_major = false;
};

// d[n / 2] and registers[4] are the lane's; registers: nullptr where A comes from shared memory.
void wgmma(Element element, int n, float* d, const uint32_t* registers, Operand a, Operand b,
           bool keep, const Site& site);
void wgmma_fence(const Site& site);
void wgmma_commit(const Site& site);
void wgmma_wait(int groups_left, const Site& site);

}  // namespace flashkern::emulator
