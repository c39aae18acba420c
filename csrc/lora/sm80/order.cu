// Rows sorted by adapter, on the device: no host waits for the ids.
//
// Block n serves the rows without an adapter (n = 0) or adapter n - 1. It reads all ids twice: to
// count those that come before its own, which is where its rows start, and to place its rows, in
// their order, by a scan over the block. (adapters + 1) x rows ids in all, from L2.
#include "lora/sm80/kernels.h"
#include "ptx/launch.h"

namespace flashkern::sm80 {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct Storage {
  int warp[kWarps];
};

// The sum of `value` over the block's threads before this one, and over all of them.
FK_DEVICE int scan_block(Storage& shared, int value, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(ptx::kAllLanes, sum, d);
    if (lane >= d) sum += other;
  }
  if (lane == 31) shared.warp[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += shared.warp[w];
    total += shared.warp[w];
  }
  __syncthreads();
  return before + sum - value;
}

__global__ void __launch_bounds__(kThreads)
    sort_kernel(const int64_t* ids, int rows, int* order, int* starts) {
  auto& shared = ptx::shared_storage<Storage>();
  const int own = static_cast<int>(blockIdx.x) - 1, count = static_cast<int>(gridDim.x) - 1;
  int smaller = 0, next = 0, total = 0;
  for (int i = threadIdx.x; i < rows; i += kThreads) {
    smaller += adapter_of(ids, i, count) < own;
  }
  scan_block(shared, smaller, next);
  if (threadIdx.x == 0) {
    if (own >= 0) starts[own] = next;
    if (blockIdx.x + 1 == gridDim.x) starts[own + 1] = rows;
  }
  for (int first = 0; first < rows; first += kThreads) {
    const int i = first + threadIdx.x;
    const int mine = i < rows && adapter_of(ids, i, count) == own;
    const int before = scan_block(shared, mine, total);
    if (mine) order[next + before] = i;
    next += total;
  }
}

}  // namespace

void sort_rows(const int64_t* ids, int64_t rows, int64_t count, int* order, int* starts,
               cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(count + 1);
  ptx::launch(sort_kernel, {blocks, kThreads, sizeof(Storage)}, stream, ids, static_cast<int>(rows),
              order, starts);
}

}  // namespace flashkern::sm80
