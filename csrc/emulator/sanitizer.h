// What AddressSanitizer must be told: which stack runs, and which bytes nobody may touch. Empty in
// a plain build.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define FK_EMULATOR_SANITIZED 1
#endif

namespace flashkern::emulator {

#if defined(FK_EMULATOR_SANITIZED)

// The stack of the thread that launches, learnt when its first fiber starts.
inline const void* caller_stack = nullptr;
inline size_t caller_stack_bytes = 0;

inline void start_switch(void** fake_stack, const void* stack, size_t bytes) {
  if (stack == nullptr) {
    stack = caller_stack;
    bytes = caller_stack_bytes;
  }
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
}

// The fiber that a launch starts first comes from the caller's stack; all others from a pooled one.
inline bool from_caller = false;

inline void finish_switch(void* fake_stack) {
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(fake_stack, &stack, &bytes);
  if (from_caller) {
    caller_stack = stack;
    caller_stack_bytes = bytes;
    from_caller = false;
  }
}

inline void leaving_caller() { from_caller = true; }
inline void poison(void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
inline void unpoison(void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }

#else

inline void start_switch(void**, const void*, size_t) {}
inline void finish_switch(void*) {}
inline void leaving_caller() {}
inline void poison(void*, size_t) {}
inline void unpoison(void*, size_t) {}

#endif

}  // namespace flashkern::emulator
