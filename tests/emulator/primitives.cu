// One small kernel for each primitive with a lane layout: inputs to shared memory, the primitive,
// registers out. The same source runs on a GPU, where it records what the emulator must match.
#include "guarded.h"
#include "ptx/copy.h"
#include "ptx/launch.h"
#include "ptx/matrix.h"
#include "ptx/mma.h"

namespace flashkern::emulator_test {
namespace {

constexpr int kBytes = 4096;

struct Storage {
  alignas(16) unsigned char bytes[kBytes];
};

FK_DEVICE void fill(Storage& shared, const unsigned char* from) {
  for (int i = threadIdx.x; i < kBytes; i += blockDim.x) shared.bytes[i] = from[i];
  __syncthreads();
}

// rows[lane]: the offset that the lane passes. out[lane][N].
template <int N, bool kTransposed>
__global__ void load_matrices(const unsigned char* from, const int* rows, uint32_t* out) {
  auto& shared = ptx::shared_storage<Storage>();
  fill(shared, from);
  const int lane = threadIdx.x;
  uint32_t d[N];
  if constexpr (kTransposed) {
    ptx::ldmatrix_trans(d, shared.bytes + rows[lane]);
  } else {
    ptx::ldmatrix(d, shared.bytes + rows[lane]);
  }
  for (int i = 0; i < N; ++i) out[lane * N + i] = d[i];
}

template <class T>
__global__ void multiply(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  uint32_t left[4], right[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) left[i] = a[lane * 4 + i], sums[i] = d[lane * 4 + i];
  for (int i = 0; i < 2; ++i) right[i] = b[lane * 2 + i];
  ptx::mma<T>(sums, left, right);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sums[i];
}

template <class T>
__global__ void convert(const float* x, uint32_t* pairs, float* back, int n) {
  for (int i = threadIdx.x; i < n / 2; i += blockDim.x) {
    pairs[i] = ptx::pack<T>(x[2 * i], x[2 * i + 1]);
    const float2 y = ptx::unpack<T>(pairs[i]);
    back[2 * i] = y.x, back[2 * i + 1] = y.y;
  }
}

__global__ void approximate(const float* x, float* exp2, uint32_t* tf32, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    exp2[i] = ptx::fast_exp2(x[i]);
    tf32[i] = ptx::to_tf32(x[i]);
  }
}

// cp.async of kSize bytes a lane, `bytes` of them from memory.
template <int kSize>
__global__ void copy(const unsigned char* from, int bytes, unsigned char* out) {
  auto& shared = ptx::shared_storage<Storage>();
  const int at = threadIdx.x * kSize;
  ptx::copy_async<kSize>(shared.bytes + at, from + at, bytes);
  ptx::copy_commit();
  ptx::copy_wait<0>();
  for (int i = 0; i < kSize; ++i) out[at + i] = shared.bytes[at + i];
}

void launch_load(int n, bool transposed, const unsigned char* from, const int* rows, uint32_t* d) {
  const auto run = [&](auto kernel) {
    ptx::launch(kernel, {1, 32, sizeof(Storage)}, nullptr, from, rows, d);
  };
  if (n == 1) run(transposed ? load_matrices<1, true> : load_matrices<1, false>);
  if (n == 2) run(transposed ? load_matrices<2, true> : load_matrices<2, false>);
  if (n == 4) run(transposed ? load_matrices<4, true> : load_matrices<4, false>);
}

}  // namespace
}  // namespace flashkern::emulator_test

using namespace flashkern;
using namespace flashkern::emulator_test;

#define FK_TEST extern "C" __attribute__((visibility("default"))) const char*

FK_TEST fk_ldmatrix(int n, int transposed, const unsigned char* from, const int* rows,
                    uint32_t* d) {
  return guarded([&] { launch_load(n, transposed, from, rows, d); });
}

// type: 0 bfloat16, 1 float16, 2 TF32.
FK_TEST fk_mma(int type, const uint32_t* a, const uint32_t* b, float* d) {
  return guarded([&] {
    const auto kernel = type == 0   ? multiply<BFloat16>
                        : type == 1 ? multiply<Half>
                                    : multiply<ptx::Tf32>;
    ptx::launch(kernel, {1, 32}, nullptr, a, b, d);
  });
}

FK_TEST fk_convert(int type, const float* x, uint32_t* pairs, float* back, int n) {
  return guarded([&] {
    ptx::launch(type == 0 ? convert<BFloat16> : convert<Half>, {1, 32}, nullptr, x, pairs, back, n);
  });
}

FK_TEST fk_approximate(const float* x, float* exp2, uint32_t* tf32, int n) {
  return guarded([&] { ptx::launch(approximate, {1, 32}, nullptr, x, exp2, tf32, n); });
}

FK_TEST fk_copy(int size, const unsigned char* from, int bytes, unsigned char* out) {
  return guarded([&] {
    const auto kernel = size == 4 ? copy<4> : size == 8 ? copy<8> : copy<16>;
    ptx::launch(kernel, {1, 32, sizeof(Storage)}, nullptr, from, bytes, out);
  });
}
