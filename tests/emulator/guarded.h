// Test entry points are called by ctypes: an exception leaves as its text.
#pragma once

#include <exception>
#include <string>

namespace flashkern::emulator_test {

template <class F>
const char* guarded(F&& f) {
  static std::string text;
  try {
    f();
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
  return nullptr;
}

}  // namespace flashkern::emulator_test
