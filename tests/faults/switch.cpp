// What sets the fault that is on, and the emulator's schedule; which faults were asked for.
#include <cstdint>

#include "emulator/api.h"

#define FK_EXPORT extern "C" __attribute__((visibility("default")))

FK_EXPORT int fk_fault = 0;
FK_EXPORT unsigned char fk_noted[8192] = {};

FK_EXPORT __attribute__((no_sanitize("thread"))) bool fk_note(int fault) {
  fk_noted[fault] = 1;
  return false;
}

FK_EXPORT void fk_seed(uint64_t seed) { flashkern::emulator::set_seed(seed); }
