// Twin of csrc/ptx/launch.h: the kernel runs here and now; its errors are thrown.
#pragma once

#include <stdexcept>
#include <string>
#include <tuple>

#include "ptx/core.h"

namespace flashkern::ptx {

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  dim3 cluster = {1, 1, 1};
  bool cooperative = false;
};

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t,
            Arguments&&... arguments) {
  if (shape.shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)),
          "shared memory of a kernel");
  }
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };
  const Call call{kernel, {static_cast<Parameters>(arguments)...}};
  const auto extent = [](dim3 d, uint32_t (&out)[3]) { out[0] = d.x, out[1] = d.y, out[2] = d.z; };
  emulator::Shape to_run{.shared_bytes = shape.shared_bytes, .cooperative = shape.cooperative};
  extent(shape.grid, to_run.grid);
  extent(shape.block, to_run.block);
  extent(shape.cluster, to_run.cluster);
  emulator::run(
      reinterpret_cast<const void*>(kernel), to_run,
      [](const void* context) {
        const auto& [kernel, parameters] = *static_cast<const Call*>(context);
        std::apply(kernel, parameters);
      },
      &call);
}

}  // namespace flashkern::ptx
