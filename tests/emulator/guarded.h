// Test entry points are called by ctypes: an exception leaves as its text, and so does what a GPU
// says of a kernel when it is done.
#pragma once

#include <exception>
#include <string>

#include "ptx/launch.h"

namespace flashkern::emulator_test {

template <class F>
const char* guarded(F&& f) {
  static std::string text;
  try {
    f();
    ptx::check(cudaDeviceSynchronize(), "kernel");
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
  return nullptr;
}

}  // namespace flashkern::emulator_test
