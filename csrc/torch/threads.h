// Torch's own thread pool behind flashkern's Threads: torch.set_num_threads rules.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "threads.h"

namespace flashkern {

inline Threads torch_threads() {
  Threads threads;
  threads.count = static_cast<int>(torch::stable::get_num_threads());
  threads.parallel = [](int count, void* context, Threads::Body body) {
    torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) body(context, static_cast<int>(t));
    });
  };
  return threads;
}

}  // namespace flashkern
