// The beam kernel's tickets (csrc/beam/sm80/tickets.h) over a runtime that a test directs: streams
// of many numbers, a device without memory, a stream that is captured.
#include <cuda_runtime.h>

#include <cstdlib>

namespace {

unsigned long long stream_id = 1;
bool full = false, capturing = false;
int mallocs = 0, memsets = 0, errors_taken = 0;

cudaError_t directed_malloc(void** p, size_t bytes) {
  ++mallocs;
  if (full) return cudaErrorMemoryAllocation;
  *p = std::malloc(bytes);
  return cudaSuccess;
}
cudaError_t directed_last_error() { return ++errors_taken, cudaSuccess; }
cudaError_t directed_stream_id(cudaStream_t, unsigned long long* id) {
  return *id = stream_id, cudaSuccess;
}
cudaError_t directed_capturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t directed_memset(void* p, int value, size_t bytes, cudaStream_t stream) {
  ++memsets;
  return cudaMemsetAsync(p, value, bytes, stream);
}

}  // namespace

#define cudaMalloc directed_malloc
#define cudaGetLastError directed_last_error
#define cudaStreamGetId directed_stream_id
#define cudaStreamIsCapturing directed_capturing
#define cudaMemsetAsync directed_memset
#include "beam/sm80/tickets.h"

#include "guarded.h"

// Asks once. out: whether the tickets are the workspace's, whether they are zeros, calls so far of
// malloc, memset and last error.
extern "C" const char* fk_tickets(int stream, int count, int device_is_full, int is_capturing,
                                  int* out) {
  return flashkern::emulator_test::guarded([&] {
    stream_id = stream, full = device_is_full, capturing = is_capturing;
    static int workspace[8192];
    for (int& word : workspace) word = -1;
    const int* tickets = flashkern::beam::sm80::tickets_for(nullptr, count, workspace);
    bool zeros = true;
    for (int i = 0; i < count; ++i) zeros &= tickets[i] == 0;
    const int results[5] = {tickets == workspace, zeros, mallocs, memsets, errors_taken};
    for (int i = 0; i < 5; ++i) out[i] = results[i];
  });
}
