// C = A B^T for bfloat16 A (m, k) and B (n, k), float32 C (m, n): the smallest kernel that uses
// everything an sm_80 attention kernel uses, and the emulator's speed test.
//
//   block   64 x 64 of C, 4 warps; warp w owns rows 16 w .. 16 w + 15
//   memory  2 stages x (A 64 x 32 + B 64 x 32) bf16 = 16 KiB, 16-byte chunks swizzled by row
//   pipe    copy stage s + 1 | multiply stage s; tails are zero-filled by cp.async
#include "guarded.h"
#include "ptx/copy.h"
#include "ptx/launch.h"
#include "ptx/matrix.h"
#include "ptx/mma.h"

namespace flashkern::emulator_test {
namespace {

constexpr int kTile = 64, kDepth = 32, kThreads = 128, kStages = 2;
constexpr int kChunks = kDepth / 8;  // of 16 bytes, in a row

struct Storage {
  BFloat16 a[kStages][kTile * kDepth];
  BFloat16 b[kStages][kTile * kDepth];
};

struct Params {
  const BFloat16 *a, *b;
  float* c;
  int m, n, k;
};

// Where chunk `chunk` of row `row` lies: rows two apart meet the same banks, so pairs of rows turn.
FK_DEVICE int offset(int row, int chunk) {
  return row * kDepth + ((chunk ^ (row / 2 % kChunks)) * 8);
}

FK_DEVICE void copy_tile(BFloat16* tile, const BFloat16* matrix, int first, int rows, int k0,
                         int k) {
  for (int i = threadIdx.x; i < kTile * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks, column = k0 + 8 * chunk;
    const int left = first + row < rows ? min(8, max(0, k - column)) : 0;
    const BFloat16* source = matrix + (left > 0 ? int64_t{first + row} * k + column : 0);
    ptx::copy_async<16>(tile + offset(row, chunk), source, 2 * left);
  }
}

FK_DEVICE void multiply(const BFloat16* a, const BFloat16* b, float (&sums)[8][4]) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t left[4], right[8][2];
    ptx::ldmatrix(left, a + offset(row, k / 8 + lane / 16));
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      uint32_t four[4];
      ptx::ldmatrix(four, b + offset(8 * j + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
      right[j][0] = four[0], right[j][1] = four[1];
      right[j + 1][0] = four[2], right[j + 1][1] = four[3];
    }
    ptx::mma_strip<BFloat16>(sums, left, right);
  }
}

__global__ void __launch_bounds__(kThreads) gemm(const Params p) {
  auto& shared = ptx::shared_storage<Storage>();
  const int row0 = blockIdx.y * kTile, column0 = blockIdx.x * kTile;
  const int steps = (p.k + kDepth - 1) / kDepth;
  float sums[8][4] = {};
  const auto copy = [&](int step) {
    if (step < steps) {
      copy_tile(shared.a[step % kStages], p.a, row0, p.m, step * kDepth, p.k);
      copy_tile(shared.b[step % kStages], p.b, column0, p.n, step * kDepth, p.k);
    }
    ptx::copy_commit();
  };
  copy(0);
  for (int step = 0; step < steps; ++step) {
    copy(step + 1);
    ptx::copy_wait<1>();
    __syncthreads();
    multiply(shared.a[step % kStages], shared.b[step % kStages], sums);
    __syncthreads();
  }
  const int lane = threadIdx.x % 32, row = row0 + threadIdx.x / 32 * 16 + lane / 4;
  for (int j = 0; j < 8; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int r = row + i / 2 * 8, c = column0 + 8 * j + lane % 4 * 2 + i % 2;
      if (r < p.m && c < p.n) p.c[int64_t{r} * p.n + c] = sums[j][i];
    }
  }
}

}  // namespace

void launch_gemm(const BFloat16* a, const BFloat16* b, float* c, int m, int n, int k) {
  const dim3 grid((n + kTile - 1) / kTile, (m + kTile - 1) / kTile);
  ptx::launch(gemm, {grid, kThreads, sizeof(Storage)}, nullptr, Params{a, b, c, m, n, k});
}

}  // namespace flashkern::emulator_test

extern "C" __attribute__((visibility("default"))) const char* fk_gemm(const void* a, const void* b,
                                                                      float* c, int m, int n,
                                                                      int k) {
  using namespace flashkern;
  return emulator_test::guarded([&] {
    emulator_test::launch_gemm(static_cast<const BFloat16*>(a), static_cast<const BFloat16*>(b), c,
                               m, n, k);
  });
}
