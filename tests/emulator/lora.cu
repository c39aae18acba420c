// The LoRA launchers for ctypes: a workspace of exactly the plan's size, full of NaN, around each.
#include <cstdlib>
#include <cstring>
#include <string>

#include "emulator/api.h"
#include "lora/gpu.h"

namespace {

using namespace flashkern;

thread_local std::string message;

template <class Params, class Launch>
const char* run(const Params& p, Launch&& launch) {
  const int64_t bytes = gpu::lora_workspace(p);
  void* workspace = std::aligned_alloc(256, bytes / 256 * 256 + 256);
  std::memset(workspace, 0xff, bytes);
  message.clear();
  try {
    launch(p, workspace, nullptr);
  } catch (const std::exception& error) {
    message = error.what();
  }
  std::free(workspace);
  return message.c_str();
}

}  // namespace

#define FK_EXPORT extern "C" __attribute__((visibility("default")))

FK_EXPORT const char* fk_lora_forward(const LoraForward* p) { return run(*p, gpu::lora_forward); }

FK_EXPORT const char* fk_lora_backward(const LoraBackward* p) {
  return run(*p, gpu::lora_backward);
}

FK_EXPORT void fk_emulator_seed(uint64_t seed) { emulator::set_seed(seed); }
