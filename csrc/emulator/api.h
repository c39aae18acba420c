// What the twin's headers ask of the emulator: everything that a kernel's source, compiled as C++,
// calls out of line. The types behind it are in machine.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>

namespace flashkern::emulator {

using Site = std::source_location;  // of a primitive's call: every report names file and line

// A kernel did what a GPU would punish: a deadlock, a misused barrier, an address out of bounds.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline constexpr uint32_t kAllLanes = 0xffffffffu;

// ---- launches ----

struct Shape {
  uint32_t grid[3] = {}, block[3] = {}, cluster[3] = {};
  size_t shared_bytes = 0;
  bool cooperative = false;  // all blocks together; otherwise cluster by cluster
};

void run(const void* kernel, const Shape& shape, void (*call)(const void*), const void* context);

// What varies from run to run. The same seed gives the same schedule.
void set_seed(uint64_t seed);
void set_compute_capability(int major, int minor);  // 8.0 or 9.0: limits and properties follow

// ---- a warp's collectives: the last lane to arrive does the work for all ----

// `lanes[i]` is what lane i passed as its argument; only lanes in `mask` count.
using Complete = void (*)(uint32_t mask, void* const* lanes);

enum class Collective {
  kAligned,   // all 32 lanes, at one instruction
  kMasked,    // the lanes of the mask, none of them gone
  kConverge,  // __syncwarp: lanes that have returned are not waited for
};

void gather(const char* name, Collective kind, uint32_t mask, void* argument, Complete complete,
            const Site& site);

uint32_t lane();  // of the running thread, within its warp
uint32_t warp();  // within its block

// ---- barriers ----

enum class Vote { kNone, kCount, kAnd, kOr };

// Barrier `id` of the block. threads = 0: all that have not returned. Returns the vote's result.
int block_barrier(const char* name, int id, int threads, Vote vote, int value, const Site& site);
void block_arrive(const char* name, int id, int threads, const Site& site);

void cluster_arrive(const Site& site);
void cluster_wait(const Site& site);
uint32_t cluster_rank();
uint32_t cluster_size();
void* in_cluster(const void* shared, uint32_t rank, const Site& site);

// setmaxnreg: a warp gives registers back, or waits for as many as it wants.
void set_registers(int count, bool more, const Site& site);

void fence();                                    // __threadfence and its kin
void fence_async();                              // fence.proxy.async
void pause(const char* name, const Site& site);  // somebody else's turn

// ---- memory ----

// The block's dynamic shared memory; throws where it is smaller than `bytes`.
void* shared_memory(size_t bytes, size_t alignment, const Site& site);
// In the shared window, as a GPU counts; and back. The window starts at 1024, as Hopper's does.
uint32_t shared_address(const void* p, const Site& site);
void* shared_pointer(uint32_t address, size_t bytes, const char* name, const Site& site);
// Throws unless [p, p + bytes) is shared memory of the block (or its cluster) and aligned.
void check_shared(const void* p, size_t bytes, size_t alignment, const char* name, const Site&);

// An access that the kernel's own code does not spell: told to the race detector.
void on_read(const void* p, size_t bytes, const char* name, const Site& site);
void on_write(const void* p, size_t bytes, const char* name, const Site& site);
// What an atomic promises: a load acquires only, a store releases only.
enum class Order { kRelaxed, kAcquire, kRelease, kAcquireRelease };
constexpr bool acquires(Order o) { return o == Order::kAcquire || o == Order::kAcquireRelease; }
constexpr bool releases(Order o) { return o == Order::kRelease || o == Order::kAcquireRelease; }
void on_atomic(const void* p, size_t bytes, const Site& site, Order order = Order::kRelaxed);

// cp.async: `bytes` from source, zeros up to `size`.
void copy_async(void* shared, const void* global, int size, int bytes, const Site& site);
void copy_commit();
void copy_wait(int groups_left, const Site& site);
void copy_arrive(uint64_t* barrier, const Site& site);  // cp.async.mbarrier.arrive.noinc

// ---- mbarriers ----

void mbarrier_init(uint64_t* barrier, uint32_t count, const Site& site);
void mbarrier_invalidate(uint64_t* barrier, const Site& site);
void mbarrier_arrive(uint64_t* barrier, uint32_t count, const Site& site);
void mbarrier_expect(uint64_t* barrier, uint32_t bytes, bool arrive, const Site& site);
bool mbarrier_try(uint64_t* barrier, uint32_t parity, const Site& site);
void mbarrier_wait(uint64_t* barrier, uint32_t parity, const Site& site);

}  // namespace flashkern::emulator
