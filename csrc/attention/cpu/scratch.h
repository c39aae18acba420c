// Working memory of a thread, kept from call to call: a kernel never pays for fresh pages, and what
// it holds is O(tile).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "guard.h"

namespace flashkern::FK_ISA::attention {

inline constexpr int64_t kAlignment = 64;  // bytes: a cache line, the widest vector

struct FreeMemory {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], FreeMemory>;

inline int64_t padded_floats(int64_t count) { return (count + 15) / 16 * 16; }

inline Floats allocate_floats(int64_t count) {
  const int64_t bytes = padded_floats(count > 0 ? count : 1) * 4;
  void* p = std::aligned_alloc(kAlignment, bytes);
  if (p == nullptr) throw std::bad_alloc();
  return Floats(static_cast<float*>(p));
}

// Hands out aligned pieces of one buffer. Kernels keep one in a thread_local variable.
class Scratch {
 public:
  // What was taken before is no longer there; `floats` is the sum of what will be taken.
  void reset(int64_t floats) {
    floats = padded_floats(floats) + kMostPieces * kGuardFloats;
    if (size_ < floats) {
      size_ = 0;
      buffer_.reset();
      buffer_ = allocate_floats(floats);
      size_ = floats;
    }
    next_ = buffer_.get();
    forbid(next_, size_);
  }
  float* take(int64_t floats) {
    float* piece = next_;
    permit(piece, floats);
    next_ += padded_floats(floats) + kGuardFloats;
    return piece;
  }

 private:
  static constexpr int64_t kMostPieces = 24;

  Floats buffer_;
  int64_t size_ = 0;
  float* next_ = nullptr;
};

}  // namespace flashkern::FK_ISA::attention
