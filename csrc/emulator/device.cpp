#include "emulator/device.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "emulator/api.h"
#include "emulator/cuda_runtime.h"

namespace flashkern::emulator {
namespace {

std::unordered_map<const void*, size_t>& allowances() {
  static std::unordered_map<const void*, size_t> map;
  return map;
}

}  // namespace

Device& current_device() {
  static Device device;
  return device;
}

void set_compute_capability(int major, int minor) {
  Device& device = current_device();
  device.major = major;
  device.minor = minor;
  device.shared_bytes_per_processor = (major >= 9 ? 228 : minor == 0 ? 164 : 100) << 10;
  device.shared_bytes = device.shared_bytes_per_processor - 1024;
  device.threads_per_processor = major >= 9 || minor == 0 ? 2048 : 1536;
}

size_t allowed_shared_bytes(const void* kernel) {
  const auto found = allowances().find(kernel);
  return found == allowances().end() ? 48 << 10 : found->second;
}

}  // namespace flashkern::emulator

using flashkern::emulator::current_device;

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorMemoryAllocation) return "out of memory";
  return error == cudaSuccess ? "no error" : "invalid argument";
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* id) {
  *id = 1;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

cudaError_t cudaMalloc(void** p, size_t bytes) {
  *p = std::malloc(bytes);
  if (*p == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*p, 0xff, bytes);  // as undefined as a GPU's
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const auto& device = current_device();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = device.processors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device.minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 << 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(device.shared_bytes);
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(device.shared_bytes_per_processor);
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = device.threads_per_processor;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrL2CacheSize:
      *value = 50 << 20;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > current_device().shared_bytes) {
    return cudaErrorInvalidValue;
  }
  flashkern::emulator::allowances()[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads,
                                                          size_t shared_bytes) {
  const auto& device = current_device();
  const size_t by_memory = device.shared_bytes_per_processor / (shared_bytes + 1024);
  *blocks = std::min({device.threads_per_processor / threads, static_cast<int>(by_memory), 32});
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
