// Guards between the pieces that a kernel cuts from one buffer. A sanitizer sees where a buffer
// ends, not where a piece does: in an AddressSanitizer build each piece is followed by memory that
// may not be touched. In any other build there are no guards and nothing happens here.
#pragma once

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace flashkern {

#if defined(__SANITIZE_ADDRESS__)
inline constexpr int64_t kGuardFloats = 16;  // a multiple of every alignment
inline void forbid(float* p, int64_t floats) { __asan_poison_memory_region(p, floats * 4); }
inline void permit(float* p, int64_t floats) { __asan_unpoison_memory_region(p, floats * 4); }
#else
inline constexpr int64_t kGuardFloats = 0;
inline void forbid(float*, int64_t) {}
inline void permit(float*, int64_t) {}
#endif

}  // namespace flashkern
