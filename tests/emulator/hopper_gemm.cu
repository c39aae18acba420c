// C = A B^T as Hopper likes it: one producer warp with TMA, one consumer warpgroup with wgmma, a
// ring of stages between them. A (m, k), B (n, k) bfloat16, C (m, n) float32; the tails come as
// zeros.
//
//   block   64 x 64 of C; warp 4 loads, warps 0-3 multiply
//   memory  3 stages x (A 64 x 64 + B 64 x 64) bf16, 128-byte swizzle = 48 KiB
//   pipe    full[s]: 1 arrival + the bytes; empty[s]: 1 arrival of the consumers
#include "guarded.h"
#include "ptx/cluster.h"
#include "ptx/launch.h"
#include "ptx/mbarrier.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"

namespace flashkern::emulator_test {
namespace {

constexpr int kTile = 64, kDepth = 64, kStages = 3, kConsumers = 128;
constexpr int kTileBytes = kTile * kDepth * 2;

struct Storage {
  alignas(1024) BFloat16 a[kStages][kTile * kDepth];
  alignas(1024) BFloat16 b[kStages][kTile * kDepth];
  uint64_t full[kStages], empty[kStages];
};

FK_DEVICE void produce(Storage& shared, const ptx::TensorMap& a, const ptx::TensorMap& b, int row0,
                       int column0, int steps) {
  if (threadIdx.x % 32 != 0) return;
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages, round = step / kStages;
    ptx::mbarrier_wait(&shared.empty[stage], round % 2 ^ 1);
    ptx::mbarrier_arrive_expect(&shared.full[stage], 2 * kTileBytes);
    ptx::tma_load(shared.a[stage], a, {step * kDepth, row0}, &shared.full[stage]);
    ptx::tma_load(shared.b[stage], b, {step * kDepth, column0}, &shared.full[stage]);
  }
}

FK_DEVICE void consume(Storage& shared, float (&sums)[kTile / 2], int steps) {
  const auto descriptor = [](const void* tile) {
    return ptx::matrix_descriptor(ptx::shared_address(tile), ptx::Swizzle::k128, 16, 1024);
  };
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages, round = step / kStages;
    ptx::mbarrier_wait(&shared.full[stage], round % 2);
    const uint64_t a = descriptor(shared.a[stage]), b = descriptor(shared.b[stage]);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      ptx::wgmma<BFloat16>(sums, ptx::advance(a, 32 * k), ptx::advance(b, 32 * k), step + k > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();  // the step before this one is done: its stage may be filled again
    if (step > 0 && threadIdx.x % 32 == 0) {
      ptx::mbarrier_arrive(&shared.empty[(step - 1) % kStages]);
    }
  }
  ptx::wgmma_wait<0>();
}

__global__ void __launch_bounds__(kConsumers + 32)
    gemm(const __grid_constant__ ptx::TensorMap a, const __grid_constant__ ptx::TensorMap b,
         float* c, int m, int n, int k) {
  auto& shared = ptx::shared_storage<Storage>();
  const int row0 = blockIdx.y * kTile, column0 = blockIdx.x * kTile;
  const int steps = (k + kDepth - 1) / kDepth;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&shared.full[i], 1);
      ptx::mbarrier_init(&shared.empty[i], kConsumers / 32);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) return produce(shared, a, b, row0, column0, steps);
  float sums[kTile / 2];  // the first product overwrites it
  consume(shared, sums, steps);
  const int lane = threadIdx.x % 32, row = row0 + threadIdx.x / 32 * 16 + lane / 4;
  for (int i = 0; i < kTile / 2; ++i) {
    const int r = row + i / 2 % 2 * 8, column = column0 + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (r < m && column < n) c[int64_t{r} * n + column] = sums[i];
  }
}

ptx::TensorMap map_of(const void* data, int rows, int k) {
  return ptx::make_tensor_map({DType::kBFloat16,
                               data,
                               2,
                               {static_cast<uint64_t>(k), static_cast<uint64_t>(rows)},
                               {0, 2 * static_cast<uint64_t>(k)},
                               {kDepth, kTile},
                               ptx::Swizzle::k128});
}

void launch_gemm(const void* a, const void* b, float* c, int m, int n, int k) {
  const dim3 grid((n + kTile - 1) / kTile, (m + kTile - 1) / kTile);
  ptx::launch(gemm, {grid, kConsumers + 32, sizeof(Storage)}, nullptr, map_of(a, m, k),
              map_of(b, n, k), c, m, n, k);
}

}  // namespace
}  // namespace flashkern::emulator_test

extern "C" __attribute__((visibility("default"))) const char* fk_gemm(const void* a, const void* b,
                                                                      float* c, int m, int n,
                                                                      int k) {
  using namespace flashkern::emulator_test;
  return guarded([&] { launch_gemm(a, b, c, m, n, k); });
}
