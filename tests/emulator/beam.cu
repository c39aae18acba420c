// The beam top-k kernel behind plain C, for ctypes.
#include "beam/sm80/topk.cu"

#include <cstring>

namespace {

char message[4096];

}  // namespace

extern "C" {

// nullptr, or what went wrong.
const char* fk_beam_topk(const flashkern::beam::TopkParams* p, void* workspace) {
  try {
    flashkern::gpu::beam_topk(*p, workspace, nullptr);
    return nullptr;
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), sizeof message - 1);
    return message;
  }
}

int64_t fk_beam_workspace(const flashkern::beam::TopkParams* p) {
  return flashkern::gpu::beam_topk_workspace(*p);
}
}
