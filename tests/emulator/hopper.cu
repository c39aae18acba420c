// Hopper's primitives, one small kernel each: TMA tiles, wgmma with every operand layout, stmatrix,
// clusters, register hand-over. The same source runs on a GPU.
#include "guarded.h"
#include "ptx/cluster.h"
#include "ptx/launch.h"
#include "ptx/matrix.h"
#include "ptx/mbarrier.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"

namespace flashkern::emulator_test {
namespace {

constexpr int kBytes = 64 << 10;

struct Storage {
  alignas(1024) unsigned char tile[kBytes];
  uint64_t barrier;
};

template <int kRank>
FK_DEVICE void coordinates(const int* at, int32_t (&out)[kRank]) {
  for (int i = 0; i < kRank; ++i) out[i] = at[i];
}

// The tile's bytes, swizzled as they lie.
template <int kRank>
__global__ void load_tile(const __grid_constant__ ptx::TensorMap map, const int* at, int bytes,
                          unsigned char* out) {
  auto& shared = ptx::shared_storage<Storage>();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&shared.barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t where[kRank];
    coordinates(at, where);
    ptx::mbarrier_arrive_expect(&shared.barrier, bytes);
    ptx::tma_load(shared.tile, map, where, &shared.barrier);
  }
  ptx::mbarrier_wait(&shared.barrier, 0);
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) out[i] = shared.tile[i];
}

template <int kRank>
__global__ void store_tile(const __grid_constant__ ptx::TensorMap map, const int* at, int bytes,
                           const unsigned char* from, bool add) {
  auto& shared = ptx::shared_storage<Storage>();
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) shared.tile[i] = from[i];
  ptx::fence_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t where[kRank];
    coordinates(at, where);
    if (add) {
      ptx::tma_add(map, where, shared.tile);
    } else {
      ptx::tma_store(map, where, shared.tile);
    }
    ptx::store_commit();
    ptx::store_wait<0>();
  }
}

// d (128 lanes, R) = a b + d. The operands' bytes are put into shared memory as they are given.
template <class T, ptx::Major kA, ptx::Major kB, int R>
__global__ void multiply(const unsigned char* from, uint64_t a, uint64_t b, float* d) {
  auto& shared = ptx::shared_storage<Storage>();
  for (int i = threadIdx.x; i < kBytes; i += blockDim.x) shared.tile[i] = from[i];
  ptx::fence_async();
  __syncthreads();
  float sums[R];
  for (int i = 0; i < R; ++i) sums[i] = d[threadIdx.x * R + i];
  const uint64_t base = ptx::shared_address(shared.tile) >> 4;
  ptx::wgmma_fence();
  ptx::wgmma<T, kA, kB>(sums, a + base, b + base, true);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < R; ++i) d[threadIdx.x * R + i] = sums[i];
}

// A from registers: a (128 lanes, 4).
template <class T, ptx::Major kB, int R>
__global__ void multiply_registers(const unsigned char* from, const uint32_t* a, uint64_t b,
                                   float* d) {
  auto& shared = ptx::shared_storage<Storage>();
  for (int i = threadIdx.x; i < kBytes; i += blockDim.x) shared.tile[i] = from[i];
  ptx::fence_async();
  __syncthreads();
  float sums[R] = {};
  uint32_t left[4];
  for (int i = 0; i < 4; ++i) left[i] = a[threadIdx.x * 4 + i];
  ptx::wgmma_fence();
  ptx::wgmma<T, kB>(sums, left, b + (ptx::shared_address(shared.tile) >> 4), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < R; ++i) d[threadIdx.x * R + i] = sums[i];
}

template <int N, bool kTransposed>
__global__ void store_matrices(const uint32_t* s, const int* rows, unsigned char* out) {
  auto& shared = ptx::shared_storage<Storage>();
  for (int i = threadIdx.x; i < 4096; i += 32) shared.tile[i] = 0;
  __syncwarp();
  uint32_t registers[N];
  for (int i = 0; i < N; ++i) registers[i] = s[threadIdx.x * N + i];
  if constexpr (kTransposed) {
    ptx::stmatrix_trans(shared.tile + rows[threadIdx.x], registers);
  } else {
    ptx::stmatrix(shared.tile + rows[threadIdx.x], registers);
  }
  __syncwarp();
  for (int i = threadIdx.x; i < 4096; i += 32) out[i] = shared.tile[i];
}

// Each block writes its rank into every block of its cluster, by shared memory of others; then a
// multicast from block 0 brings one tile to all.
__global__ void cluster(const __grid_constant__ ptx::TensorMap map, int* ranks,
                        unsigned char* tiles, int bytes) {
  auto& shared = ptx::shared_storage<Storage>();
  auto* seen = reinterpret_cast<int*>(shared.tile + 32768);
  const uint32_t rank = ptx::cluster_rank(), size = ptx::cluster_size();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&shared.barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(&shared.barrier, bytes);
  }
  ptx::cluster_sync();
  if (threadIdx.x < size) ptx::in_cluster(seen, threadIdx.x)[rank] = 100 + rank;
  if (threadIdx.x == 0 && rank == 0) {
    ptx::tma_load_multicast(shared.tile, map, {0, 0}, &shared.barrier, (1 << size) - 1);
  }
  ptx::mbarrier_wait(&shared.barrier, 0);
  ptx::cluster_sync();
  if (threadIdx.x < size) ranks[blockIdx.x * size + threadIdx.x] = seen[threadIdx.x];
  for (int i = threadIdx.x; i < bytes; i += blockDim.x)
    tiles[blockIdx.x * bytes + i] = shared.tile[i];
}

ptx::TensorMap make_map(int type, void* data, int rank, const int* shape, int swizzle) {
  ptx::TensorShape map{type == 0 ? DType::kBFloat16 : DType::kFloat32,
                       data,
                       rank,
                       {},
                       {},
                       {},
                       static_cast<ptx::Swizzle>(swizzle)};
  for (int i = 0; i < rank; ++i) {
    map.extent[i] = shape[i], map.box[i] = shape[rank + i], map.stride[i] = shape[2 * rank + i];
  }
  return ptx::make_tensor_map(map);
}

template <class T, int R>
void launch_multiply(int majors, const unsigned char* from, uint64_t a, uint64_t b, float* d) {
  using enum ptx::Major;
  const auto kernel = majors == 0   ? multiply<T, kK, kK, R>
                      : majors == 1 ? multiply<T, kMN, kK, R>
                      : majors == 2 ? multiply<T, kK, kMN, R>
                                    : multiply<T, kMN, kMN, R>;
  ptx::launch(kernel, {1, 128, sizeof(Storage)}, nullptr, from, a, b, d);
}

}  // namespace
}  // namespace flashkern::emulator_test

using namespace flashkern;
using namespace flashkern::emulator_test;

#define FK_TEST extern "C" __attribute__((visibility("default"))) const char*

// shape: extents, box, strides in bytes; rank numbers each.
FK_TEST fk_tma_load(int type, void* data, int rank, const int* shape, int swizzle, const int* at,
                    int bytes, unsigned char* out) {
  return guarded([&] {
    const auto kernel = rank == 2 ? load_tile<2> : rank == 3 ? load_tile<3> : load_tile<4>;
    ptx::launch(kernel, {1, 64, sizeof(Storage)}, nullptr,
                make_map(type, data, rank, shape, swizzle), at, bytes, out);
  });
}

FK_TEST fk_tma_store(int type, void* data, int rank, const int* shape, int swizzle, const int* at,
                     int bytes, const unsigned char* from, int add) {
  return guarded([&] {
    const auto kernel = rank == 2 ? store_tile<2> : rank == 3 ? store_tile<3> : store_tile<4>;
    ptx::launch(kernel, {1, 64, sizeof(Storage)}, nullptr,
                make_map(type, data, rank, shape, swizzle), at, bytes, from, add);
  });
}

// layouts: swizzle, leading, stride, start of A, then of B.
FK_TEST fk_wgmma(int type, int n, int majors, const unsigned char* from, const int* layouts,
                 float* d) {
  return guarded([&] {
    const auto descriptor = [&](const int* l) {
      return ptx::matrix_descriptor(l[3], static_cast<ptx::Swizzle>(l[0]), l[1], l[2]);
    };
    const uint64_t a = descriptor(layouts), b = descriptor(layouts + 4);
    if (type == 1) return launch_multiply<Half, 32>(majors, from, a, b, d);
    if (n == 8) return launch_multiply<BFloat16, 4>(majors, from, a, b, d);
    if (n == 64) return launch_multiply<BFloat16, 32>(majors, from, a, b, d);
    launch_multiply<BFloat16, 128>(majors, from, a, b, d);
  });
}

FK_TEST fk_wgmma_registers(const unsigned char* from, const uint32_t* a, const int* l, float* d) {
  return guarded([&] {
    const uint64_t b = ptx::matrix_descriptor(l[3], static_cast<ptx::Swizzle>(l[0]), l[1], l[2]);
    ptx::launch(multiply_registers<BFloat16, ptx::Major::kK, 32>, {1, 128, sizeof(Storage)},
                nullptr, from, a, b, d);
  });
}

FK_TEST fk_stmatrix(int n, int transposed, const uint32_t* s, const int* rows, unsigned char* out) {
  return guarded([&] {
    const auto run = [&](auto kernel) {
      ptx::launch(kernel, {1, 32, sizeof(Storage)}, nullptr, s, rows, out);
    };
    if (n == 1) run(transposed ? store_matrices<1, true> : store_matrices<1, false>);
    if (n == 2) run(transposed ? store_matrices<2, true> : store_matrices<2, false>);
    if (n == 4) run(transposed ? store_matrices<4, true> : store_matrices<4, false>);
  });
}

FK_TEST fk_cluster(void* data, const int* shape, int* ranks, unsigned char* tiles, int bytes,
                   int blocks, int size) {
  return guarded([&] {
    ptx::launch(cluster,
                {.grid = static_cast<unsigned>(blocks),
                 .block = 64,
                 .shared_bytes = sizeof(Storage),
                 .cluster = static_cast<unsigned>(size)},
                nullptr, make_map(0, data, 2, shape, 0), ranks, tiles, bytes);
  });
}
