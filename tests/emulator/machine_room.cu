// What threads do to each other: votes, shuffles, barriers, atomics, registers; and the same things
// done wrong. Each case is a kernel; results go to `out`.
#include "guarded.h"
#include "ptx/barrier.h"
#include "ptx/cluster.h"
#include "ptx/copy.h"
#include "ptx/global.h"
#include "ptx/launch.h"
#include "ptx/matrix.h"
#include "ptx/mbarrier.h"
#include "ptx/mma.h"

namespace flashkern::emulator_test {
namespace {

struct Storage {
  alignas(128) int words[1024];
  uint64_t barrier;
};

constexpr uint32_t kAll = ptx::kAllLanes;

FK_DEVICE int me() { return static_cast<int>(threadIdx.x); }

// ---- right ----

__global__ void shuffles(int* out) {  // out[lane][10]
  const int v = 100 + me(), lane = me() % 32;
  out += 10 * me();
  out[0] = __shfl_sync(kAll, v, 5);
  out[1] = __shfl_sync(kAll, v, lane + 1, 8);
  out[2] = __shfl_xor_sync(kAll, v, 3);
  out[3] = __shfl_up_sync(kAll, v, 2, 16);
  out[4] = __shfl_down_sync(kAll, v, 2, 16);
  out[5] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
  out[6] = __any_sync(kAll, lane == 40) + 2 * __all_sync(kAll, lane < 32);
  out[7] = __reduce_add_sync(kAll, v);
  out[8] = __reduce_max_sync(kAll, v ^ 21);
  out[9] = static_cast<int>(__match_any_sync(kAll, lane % 5));
}

__global__ void halves(int* out) {  // two groups of lanes, each with its own mask
  const uint32_t mask = me() < 16 ? 0xffffu : 0xffff0000u;
  int sum = me();
  for (int i = 8; i > 0; i /= 2) sum += __shfl_xor_sync(mask, sum, i);
  __syncwarp(mask);
  out[me()] = sum;
}

__global__ void block_votes(int* out) {
  const int count = __syncthreads_count(me() % 3 == 0);
  const int all = __syncthreads_and(me() < 64), any = __syncthreads_or(me() == 77);
  out[me()] = count * 4 + all * 2 + any;
}

__global__ void early_return(int* out) {  // warps 2 and 3 leave before the barrier
  if (me() >= 64) return;
  auto& shared = ptx::shared_storage<Storage>();
  shared.words[me()] = me();
  __syncthreads();
  out[me()] = shared.words[63 - me()];
}

__global__ void atomics(int* out) {
  atomicAdd(out, 1);
  atomicMax(out + 1, me());
  atomicAdd(reinterpret_cast<float*>(out + 2), 0.5f);
  if (atomicCAS(out + 3, 0, me() + 1) == 0) out[4] = me() + 1;
  atomicInc(reinterpret_cast<unsigned*>(out + 5), 9);
}

// Producer warp 0, consumer warp 1, two named barriers, four rounds.
__global__ void hand_over(int* out) {
  auto& shared = ptx::shared_storage<Storage>();
  for (int round = 0; round < 4; ++round) {
    if (me() < 32) {
      if (round > 0) ptx::barrier_sync(2, 64);
      shared.words[me()] = 100 * round + me();
      ptx::barrier_arrive(1, 64);
    } else {
      ptx::barrier_sync(1, 64);
      out[32 * round + me() - 32] = shared.words[63 - me()];
      if (round < 3) ptx::barrier_arrive(2, 64);
    }
  }
}

// The same through mbarriers that spin on try_wait, and cp.async that arrives by itself.
__global__ void pipeline(const int* in, int* out) {
  auto& shared = ptx::shared_storage<Storage>();
  auto* full = &shared.barrier;
  auto* empty = reinterpret_cast<uint64_t*>(shared.words + 512);
  if (me() == 0) {
    ptx::mbarrier_init(full, 32);
    ptx::mbarrier_init(empty, 32);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  for (int round = 0; round < 5; ++round) {
    if (me() < 32) {
      ptx::mbarrier_wait(empty, round % 2 ^ 1);
      ptx::copy_async<4>(shared.words + me(), in + 32 * round + me());
      ptx::copy_arrive(full);
    } else {
      while (!ptx::mbarrier_try_wait(full, round % 2)) {
      }
      out[32 * round + me() - 32] = shared.words[63 - me()];
      ptx::mbarrier_arrive(empty);
    }
  }
}

// The last of the blocks to finish adds up what all have written.
__global__ void last_block(int* out) {
  auto& shared = ptx::shared_storage<Storage>();
  if (me() == 0) {
    out[2 + blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
    shared.words[0] = ptx::add_acquire_release(out, 1) == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (shared.words[0] && me() == 0) {
    for (unsigned i = 0; i < gridDim.x; ++i) out[1] += out[2 + i];
  }
}

// Blocks in a chain, each waiting for the one before: they must run together.
__global__ void chain(int* out) {
  if (me() != 0) return;
  while (ptx::load_acquire(out) != static_cast<int>(blockIdx.x)) __nanosleep(20);
  out[1] = out[1] * 2 + 1;
  ptx::add_release(out, 1);
}

__global__ void registers(int* out) {  // 384 threads: 168 each; 128 give what 256 take
  if (me() < 128) {
    ptx::give_registers<24>();
  } else {
    ptx::take_registers<240>();
  }
  out[me()] = ptx::warp_id();
}

// ---- wrong ----

__global__ void half_barrier(int*) {
  if (me() < 32) __syncthreads();
  if (me() >= 32) ptx::barrier_sync(3, 64);
}

__global__ void diverged_shuffle(int* out) {
  if (me() < 16) {
    out[me()] = __shfl_sync(kAll, me(), 0);
  } else {
    __syncwarp();
  }
}

__global__ void returned_lane(int* out) {
  if (me() == 7) return;
  out[me()] = __shfl_sync(kAll, me(), 0);
}

__global__ void foreign_mask(int* out) { out[me()] = __shfl_sync(0xffffu, me(), 0); }

__global__ void two_lines(int*) {
  if (me() % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void odd_count(int*) { ptx::barrier_sync(1, 48); }

__global__ void two_counts(int*) { ptx::barrier_sync(1, me() < 32 ? 64 : 32); }

__global__ void arrives_twice(int*) {
  if (me() < 32) {
    ptx::barrier_arrive(1, 64);
    ptx::barrier_arrive(1, 64);
  }
}

__global__ void no_init(int*) { ptx::mbarrier_wait(&ptx::shared_storage<Storage>().barrier, 0); }

__global__ void lost_phase(int*) {
  auto& shared = ptx::shared_storage<Storage>();
  if (me() == 0) ptx::mbarrier_init(&shared.barrier, 2);
  __syncthreads();
  if (me() == 0) ptx::mbarrier_arrive(&shared.barrier);
  ptx::mbarrier_wait(&shared.barrier, 0);
}

__global__ void spins_for_ever(int*) {
  auto& shared = ptx::shared_storage<Storage>();
  if (me() == 0) ptx::mbarrier_init(&shared.barrier, 1);
  __syncthreads();
  while (!ptx::mbarrier_try_wait(&shared.barrier, 0)) {
  }
}

__global__ void too_many_arrivals(int*) {
  auto& shared = ptx::shared_storage<Storage>();
  if (me() == 0) {
    ptx::mbarrier_init(&shared.barrier, 1);
    ptx::mbarrier_arrive(&shared.barrier, 2);
  }
}

__global__ void past_the_end(int* out) {
  auto& shared = ptx::shared_storage<Storage>();
  if (me() == 0) (&shared.words[0])[out[0]] = 1;
}

__global__ void small_memory(int*) { ptx::shared_storage<Storage>(); }

__global__ void greedy(int*) {  // nobody gives
  ptx::take_registers<240>();
}

// What another thread reads of a copy that nobody waited for.
__global__ void no_wait(const int* in, int* out) {
  auto& shared = ptx::shared_storage<Storage>();
  ptx::copy_async<4>(shared.words + me(), in + me());
  ptx::copy_commit();
  __syncthreads();
  out[me()] = shared.words[63 - me()];
}

// Waits for the older of two groups: the younger one is still under way.
__global__ void older_group(const int* in, int* out) {
  auto& shared = ptx::shared_storage<Storage>();
  ptx::copy_async<4>(shared.words + me(), in + me());
  ptx::copy_commit();
  ptx::copy_async<4>(shared.words + 64 + me(), in + 64 + me());
  ptx::copy_commit();
  ptx::copy_wait<1>();
  out[me()] = shared.words[me()];
  out[64 + me()] = shared.words[64 + me()];
}

// A reduction that reads its neighbour's word without a __syncwarp.
__global__ void no_syncwarp(int* out) {
  auto& shared = ptx::shared_storage<Storage>();
  shared.words[me()] = me();
  out[me()] = shared.words[me() ^ 1];
}

// The last block reads what all have written, its ticket ordered by fences: on both sides of it,
// on one, on none.
template <bool kBefore, bool kAfter>
__global__ void fenced_ticket(int* out) {
  if (me() == 0) out[2 + blockIdx.x] = 1;
  if (kBefore && me() == 0) __threadfence();
  if (me() != 0 || atomicAdd(out, 1) != static_cast<int>(gridDim.x) - 1) return;
  if (kAfter) __threadfence();
  for (unsigned i = 0; i < gridDim.x; ++i) out[1] += out[2 + i];
}

// The release is thread 0's: without a barrier it does not speak for the rest of its block.
template <bool kBarrier>
__global__ void release_for_all(int* out) {
  out[32 + 32 * blockIdx.x + threadIdx.x] = 1;
  if (kBarrier) __syncthreads();
  if (me() != 0 || ptx::add_acquire_release(out, 1) == 0) return;
  for (int i = 0; i < 64; ++i) out[1] += out[32 + i];
}

struct Case {
  const char* name;
  void (*kernel)(int*);
  unsigned grid, threads;
};

constexpr Case kCases[] = {
    {"shuffles", shuffles, 1, 32},
    {"halves", halves, 1, 32},
    {"block_votes", block_votes, 1, 96},
    {"early_return", early_return, 1, 128},
    {"atomics", atomics, 3, 64},
    {"hand_over", hand_over, 1, 64},
    {"last_block", last_block, 7, 64},
    {"fences", fenced_ticket<true, true>, 4, 32},
    {"no_fence_after", fenced_ticket<true, false>, 4, 32},
    {"no_fence_before", fenced_ticket<false, true>, 4, 32},
    {"no_fences", fenced_ticket<false, false>, 4, 32},
    {"released_for_all", release_for_all<true>, 2, 32},
    {"released_for_one", release_for_all<false>, 2, 32},
    {"chain", chain, 5, 32},
    {"registers", registers, 1, 384},
    {"half_barrier", half_barrier, 1, 64},
    {"diverged_shuffle", diverged_shuffle, 1, 32},
    {"returned_lane", returned_lane, 1, 32},
    {"foreign_mask", foreign_mask, 1, 32},
    {"two_lines", two_lines, 1, 32},
    {"odd_count", odd_count, 1, 64},
    {"two_counts", two_counts, 1, 64},
    {"arrives_twice", arrives_twice, 1, 64},
    {"no_init", no_init, 1, 32},
    {"lost_phase", lost_phase, 1, 32},
    {"spins_for_ever", spins_for_ever, 1, 32},
    {"too_many_arrivals", too_many_arrivals, 1, 32},
    {"past_the_end", past_the_end, 1, 32},
    {"greedy", greedy, 1, 384},
    {"no_syncwarp", no_syncwarp, 1, 32},
};

}  // namespace
}  // namespace flashkern::emulator_test

using namespace flashkern;
using namespace flashkern::emulator_test;

#define FK_TEST extern "C" __attribute__((visibility("default"))) const char*

FK_TEST fk_case(const char* name, int* out, int cooperative) {
  return guarded([&] {
    for (const Case& c : kCases) {
      if (std::string(name) != c.name) continue;
      return ptx::launch(c.kernel,
                         {.grid = c.grid,
                          .block = c.threads,
                          .shared_bytes = sizeof(Storage),
                          .cooperative = cooperative != 0},
                         nullptr, out);
    }
    throw std::runtime_error("no such case");
  });
}

FK_TEST fk_copies(int which, const int* in, int* out) {
  return guarded([&] {
    const auto kernel = which == 0 ? pipeline : which == 1 ? no_wait : older_group;
    ptx::launch(kernel, {1, 64, sizeof(Storage)}, nullptr, in, out);
  });
}

FK_TEST fk_launch(int threads, int bytes, int cluster) {
  return guarded([&] {
    ptx::launch(small_memory,
                {.grid = 2,
                 .block = static_cast<unsigned>(threads),
                 .shared_bytes = static_cast<size_t>(bytes),
                 .cluster = static_cast<unsigned>(cluster)},
                nullptr, nullptr);
  });
}
