// The emulated machine: threads, warps, blocks, and the scheduler that runs one thread at a time.
// Only the emulator's own sources include this.
//
// Progress is in the hands of a seeded random number generator: which lane of a warp runs next,
// which warp, when an asynchronous copy lands. A thread gives way only inside a primitive.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "emulator/api.h"
#include "emulator/fiber.h"

namespace flashkern::emulator {

struct Block;
struct Warp;

// Where a thread waits: what a deadlock report prints.
struct Wait {
  const char* name = nullptr;  // nullptr: it runs, or could
  Site site;
  int id = -1;                        // a named barrier
  const uint64_t* barrier = nullptr;  // an mbarrier
  uint32_t parity = 0;
  bool timed = false;  // mbarrier.try_wait: gives up when nothing else moves
  int registers = 0;   // setmaxnreg
};

struct Copy {  // one cp.async
  void* shared;
  const void* global;
  int size, bytes;
  uint32_t group;
  Site site;
};

struct BulkStore;  // tma.cpp
struct Product;    // wgmma.cpp

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint32_t lane = 0, index = 0;  // in the warp, in the block
  uint32_t position[3] = {};     // threadIdx
  Wait wait;
  bool result = false;              // of try_wait
  int vote = 0;                     // of the barrier that it waited at
  bool in_cluster_barrier = false;  // arrived, not yet waited
  int cluster_phase = 0;
  uint32_t number = 0;                             // in the group, for the race detector
  std::vector<Copy> copies;                        // cp.async not waited for, oldest first
  uint32_t copy_group = 0;                         // the open one
  std::vector<std::shared_ptr<BulkStore>> stores;  // TMA stores, likewise
  uint32_t store_group = 0;
};

struct Gathering {  // lanes that have arrived at one collective
  uint32_t mask, arrived;
  Collective kind;
  Complete complete;
  const char* name;
  Site site;
};

struct Warp {
  Block* block = nullptr;
  uint32_t index = 0;    // in the block
  uint32_t slot = 0;     // in the group
  uint32_t present = 0;  // lanes that exist
  uint32_t exited = 0, runnable = 0;
  int registers = 0;  // for each thread
  int wanted = 0;     // by setmaxnreg
  Thread* threads[32] = {};
  void* arguments[32] = {};
  uint32_t barrier_lines[16] = {};  // where its first lane reached each barrier
  std::vector<Gathering> gatherings;
  std::vector<std::shared_ptr<Product>> products;  // wgmmas not waited for, oldest first
  uint32_t product_group = 0;                      // the open one
  size_t issued = 0;                               // wgmmas in all
  bool fenced = false;                             // wgmma_fence since the last wait
};

struct Barrier {
  int expected = 0, arrived = 0, votes = 0;
  Site site;
  std::vector<Thread*> waiting;
  std::vector<uint64_t> by;  // a bit for each thread: who has arrived
};

// What the four warps of a warpgroup have in common: the wgmmas that the first of them issued, for
// the others to be checked against.
struct Warpgroup {
  std::vector<uint64_t> issued;
};

struct Block {
  uint32_t index[3] = {};  // blockIdx
  uint32_t rank = 0;       // in the cluster
  uint32_t first = 0;      // block number (in the group) of its cluster's first block
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  Barrier barriers[16];
  Barrier cluster_barrier;  // of the cluster's first block
  int live = 0;
  int free_registers = 0;  // in the block's pool, counted as warp.registers
  char* shared = nullptr;  // dynamic shared memory: exactly shared_bytes, a canary, a guard page
  size_t shared_bytes = 0;
};

struct Pending {  // asynchronous work that lands when the machine likes
  std::function<void()> land;
  Site site;
};

// The blocks that run together.
struct Group {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Warp*> warps;
  std::vector<uint64_t> ready;  // a bit for each warp that has a runnable lane
  std::vector<Pending> pending;
  std::vector<Thread*> mbarrier_waits;
  std::vector<Thread*> register_waits;
  uint32_t cluster_blocks = 1;
  int live = 0;
  std::exception_ptr error;
};

struct Machine {
  Thread* self = nullptr;  // whose turn it is
  Group* group = nullptr;
  Fiber caller;
  uint64_t random = 1;
  uint32_t preempt = 0, early = 0;  // chances in 2^32: leave a warp early, land a copy early
  int idle_rounds = 0;              // timeouts of try_wait since something moved
  int idle_spins = 0;               // pauses of a thread that is alone, likewise
  void (*call)(const void*) = nullptr;
  const void* context = nullptr;
  uint32_t block_dim[3] = {};
  uint32_t grid_dim[3] = {};
};

extern Machine machine;

inline uint32_t random_bits() {
  uint64_t& x = machine.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return static_cast<uint32_t>(x >> 32);
}

// The running thread stops here until somebody wakes it.
void suspend(const Wait& wait);
void wake(Thread* thread);
void wake(Warp* warp, uint32_t lanes);
// Now and then, somebody else's turn.
void maybe_preempt();

[[noreturn]] void fail(const std::string& message, const Site& site);
std::string describe(const Thread& thread);  // "thread (3,0,0) of block (0,0,0)"
std::string describe(const Block& block);    // "block (0,0,0)"
std::string describe(const Site& site);      // "file.cu:12"
std::string deadlock_report();

void barrier_thread_exits(Block& block);
void thread_exits(Thread& thread);  // throws where it still owes something
void forget(Thread& thread);        // whatever is under way for it, after an error
void run_group();
std::string mbarrier_state(const uint64_t* barrier);
void mbarrier_complete_bytes(uint64_t* barrier, uint32_t bytes, const Site& site);
void mbarrier_land(uint64_t* barrier, const Site& site);  // one arrival

// Dynamic shared memory number `slot`: ones everywhere, nothing beyond its end.
char* open_shared(size_t slot, size_t bytes);
// After the blocks have run: what they wrote beyond the end throws.
void close_shared(const Block& block);

// Block that owns a shared address, nullptr if none of the group's does.
Block* owner(const void* p);

void add_pending(std::function<void()> land, const Site& site);
bool land_one();  // a random one; false where nothing is pending

}  // namespace flashkern::emulator
