// The race detector. Kernels compiled with -fsanitize=thread call a hook at every load and store;
// here the hooks are the emulator's own (libtsan needs 2 ms to make a fiber, and 2 us to switch).
// Vector clocks, as in FastTrack (Flanagan and Freund, PLDI 2009), over the threads of the blocks
// that run together: an access to shared memory must be ordered after every conflicting one by
// barriers, not by luck. Also reported: accesses to bytes that an asynchronous copy may still be
// writing, and data that a tensor core or TMA reads without a fence.proxy.async since it was
// written.
//
// Global memory is watched likewise, across all blocks of a launch: they run side by side on a GPU,
// and only atomics and fences order them. Accesses of a single byte are recorded, not checked.
#pragma once

#include "emulator/machine.h"

namespace flashkern::emulator::race {

inline bool active = false;  // some source was compiled with the hooks

void start_launch();
void start_group();

// A barrier hands on what its arrivals brought when it completes, not before.
void barrier_reached(const void* key);
void barrier_completes(const void* key);
void barrier_left(const void* key, const Thread& thread);

void join(const Warp& warp, uint32_t lanes);  // __syncwarp

void fence();        // __threadfence
void fence_async();  // fence.proxy.async

// The first race that was seen since start_group(), "" where none was.
std::string take_report();

struct Access {
  const char* name;  // of a primitive; nullptr for the kernel's own load or store
  Site site;
  const void* pc = nullptr;  // of that load or store
};

void read(const void* p, size_t bytes, const Access& access);
void write(const void* p, size_t bytes, const Access& access);
// By TMA: what is read must have been handed over by fence.proxy.async.
void read_async(const void* p, size_t bytes, const Access& access);
// By a warp's wgmma number `time`, likewise; and when the warp has waited for it.
void read_wgmma(const void* p, size_t bytes, const Access& access, const Warp& warp, uint32_t time);
void wgmma_done(const Warp& warp, uint32_t time);
// From now until landed(), whoever touches these bytes is wrong.
void in_flight(const void* p, size_t bytes, const Access& access);
void landed(const void* p, size_t bytes, bool by_running_thread);
void atomic(const void* p, size_t bytes, const Access& access, Order order);

}  // namespace flashkern::emulator::race
