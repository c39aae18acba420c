// Fibers: a stack and the place where it stopped. One thread of a block is one fiber; a switch is
// six registers and a stack pointer, because the emulator never leaves a function half-way through
// an expression.
#pragma once

#include <cstddef>

namespace flashkern::emulator {

struct Fiber {
  void* stack_pointer = nullptr;  // where a suspended fiber goes on (x86-64); else a ucontext_t
  char* stack = nullptr;          // lowest usable byte; nullptr for the caller's own stack
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's, while suspended
};

// Makes `fiber` start at entry() when it is next switched to. Its stack comes from a pool that is
// kept: number `index` always gets the same one.
void prepare(Fiber& fiber, size_t index, void (*entry)());
bool on_stack(const void* p);  // of any fiber

// Suspends `from`, resumes `to`. `last`: `from` will never be resumed.
void switch_fiber(Fiber& from, Fiber& to, bool last = false);

// The first thing that a new fiber does.
void fiber_started();

}  // namespace flashkern::emulator
