#include "emulator/race.h"
namespace flashkern::emulator::race {
void start_group(size_t) {}
void release(const void*) {}
void acquire(const void*, const Thread&) {}
void barrier_reached(const void*) {}
void barrier_completes(const void*) {}
void barrier_left(const void*, const Thread&) {}
void join(const Warp&, uint32_t) {}
void fence() {}
void fence_async() {}
void read(const void*, size_t, const Access&) {}
void write(const void*, size_t, const Access&) {}
void read_async(const void*, size_t, const Access&) {}
void in_flight(const void*, size_t, const Access&) {}
void landed(const void*, size_t) {}
void atomic(const void*, size_t, const Access&) {}
}
