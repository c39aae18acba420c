// FK_HOST_BINDINGS(name)(pybind11::module_& m) { m.def(...); } adds functions to flashkern._host.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace flashkern {

using BindFunction = void (*)(pybind11::module_&);
std::vector<BindFunction>& host_bindings();

struct HostBinding {
  explicit HostBinding(BindFunction bind) { host_bindings().push_back(bind); }
};

}  // namespace flashkern

#define FK_HOST_BINDINGS(name)                                 \
  static void bind_##name(pybind11::module_&);                 \
  static flashkern::HostBinding register_##name(&bind_##name); \
  static void bind_##name
