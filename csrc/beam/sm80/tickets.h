// Counters that a kernel raises from zero and leaves at zero: cleared once, not at every launch.
#pragma once

#include <map>
#include <mutex>
#include <utility>

#include "ptx/launch.h"

namespace flashkern::beam::sm80 {

struct Tickets {
  int* counters = nullptr;
  int64_t count = 0;
};

// Device memory past torch's allocator: it belongs to no graph's pool, and it is never freed.
inline Tickets make_tickets(int64_t count, cudaStream_t stream) {
  void* memory = nullptr;
  auto mode = cudaStreamCaptureModeRelaxed;  // another stream may be captured
  ptx::check(cudaThreadExchangeStreamCaptureMode(&mode), "capture mode");
  const cudaError_t error = cudaMalloc(&memory, 4 * count);
  ptx::check(cudaThreadExchangeStreamCaptureMode(&mode), "capture mode");
  ptx::check(error, "memory for tickets");
  ptx::check(cudaMemsetAsync(memory, 0, 4 * count, stream), "tickets");
  return {static_cast<int*>(memory), count};
}

// At least `count` zeros for the stream's next launch: its own, since launches of one stream follow
// each other. A graph may be replayed on any stream: while one is captured they are `in_graph`,
// which the graph clears.
inline int* tickets_for(cudaStream_t stream, int64_t count, int* in_graph) {
  cudaStreamCaptureStatus status;
  ptx::check(cudaStreamIsCapturing(stream, &status), "capture status");
  if (status != cudaStreamCaptureStatusNone) {
    ptx::check(cudaMemsetAsync(in_graph, 0, 4 * count, stream), "tickets");
    return in_graph;
  }
  std::pair<int, unsigned long long> key;  // of the device and of the stream, never used again
  ptx::check(cudaGetDevice(&key.first), "device");
  ptx::check(cudaStreamGetId(stream, &key.second), "stream");
  static std::mutex mutex;
  static std::map<std::pair<int, unsigned long long>, Tickets> kept;
  const std::lock_guard lock(mutex);
  Tickets& own = kept[key];
  if (own.count < count) own = make_tickets(count + 1024, stream);
  return own.counters;
}

}  // namespace flashkern::beam::sm80
