// What a test may set before it launches: linked to every test library.
#include <cstdint>

#include "emulator/api.h"

extern "C" __attribute__((visibility("default"))) void fk_seed(uint64_t seed) {
  flashkern::emulator::set_seed(seed);
}

extern "C" __attribute__((visibility("default"))) void fk_capability(int major, int minor) {
  flashkern::emulator::set_compute_capability(major, minor);
}
