// The device that the twin of the CUDA runtime speaks of.
#pragma once

#include <cstddef>

namespace flashkern::emulator {

struct Device {
  int major = 9, minor = 0;
  int processors = 4;  // few, so that persistent kernels and splits meet their edges soon
  size_t shared_bytes = 227 << 10;  // of a block, when asked for
  size_t shared_bytes_per_processor = 228 << 10;
  int threads_per_processor = 2048;
};

Device& current_device();
size_t allowed_shared_bytes(const void* kernel);  // 48 KB, or what cudaFuncSetAttribute said

}  // namespace flashkern::emulator
