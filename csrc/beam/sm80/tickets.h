// Counters that a kernel raises from zero and leaves at zero: cleared once, not at every launch.
#pragma once

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "ptx/launch.h"

namespace flashkern::beam::sm80 {

// A program that makes streams without end shall not pile up memory for each.
inline constexpr size_t kMostStreams = 64;

struct Tickets {
  int* counters = nullptr;
  int64_t count = 0;
};

// Device memory past torch's allocator: it belongs to no graph's pool, and it is never freed. Null
// where the device has none left, as when torch holds it all; nobody asks again for so many.
inline Tickets make_tickets(int64_t count, cudaStream_t stream) {
  void* memory = nullptr;
  auto mode = cudaStreamCaptureModeRelaxed;  // another stream may be captured
  ptx::check(cudaThreadExchangeStreamCaptureMode(&mode), "capture mode");
  const cudaError_t error = cudaMalloc(&memory, 4 * count);
  ptx::check(cudaThreadExchangeStreamCaptureMode(&mode), "capture mode");
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // it is dealt with: the next to ask is not told
    return {nullptr, count};
  }
  ptx::check(error, "memory for tickets");
  ptx::check(cudaMemsetAsync(memory, 0, 4 * count, stream), "tickets");
  return {static_cast<int*>(memory), count};
}

// The stream's own, since launches of one stream follow each other; or null.
inline int* tickets_of(cudaStream_t stream, int64_t count) {
  std::pair<int, unsigned long long> key;  // of the device and of the stream, never used again
  ptx::check(cudaGetDevice(&key.first), "device");
  ptx::check(cudaStreamGetId(stream, &key.second), "stream");
  static std::mutex mutex;
  static std::map<std::pair<int, unsigned long long>, Tickets> kept;
  const std::lock_guard lock(mutex);
  if (kept.size() >= kMostStreams && !kept.contains(key)) return nullptr;
  Tickets& own = kept[key];
  if (own.count < count) own = make_tickets(std::max(count, 2 * own.count + 1024), stream);
  return own.counters;
}

// At least `count` zeros for the stream's next launch. A graph may be replayed on any stream: while
// one is captured, and where a stream has none of its own, they are `in_workspace`, cleared before
// the launch.
inline int* tickets_for(cudaStream_t stream, int64_t count, int* in_workspace) {
  cudaStreamCaptureStatus status;
  ptx::check(cudaStreamIsCapturing(stream, &status), "capture status");
  if (status == cudaStreamCaptureStatusNone) {
    if (int* own = tickets_of(stream, count)) return own;
  }
  ptx::check(cudaMemsetAsync(in_workspace, 0, 4 * count, stream), "tickets");
  return in_workspace;
}

}  // namespace flashkern::beam::sm80
