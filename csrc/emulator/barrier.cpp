// Barriers of a block and of a cluster, and setmaxnreg's account of registers.
#include <algorithm>
#include <bit>

#include "emulator/machine.h"
#include "emulator/race.h"

namespace flashkern::emulator {
namespace {

std::string barrier_name(const char* name, int id) {
  return std::string(name) + (id == 0 ? "" : " " + std::to_string(id));
}

int awaited(const Block& block, const Barrier& barrier) {
  return barrier.expected > 0 ? barrier.expected : block.live;
}

void complete(Block& block, Barrier& barrier, Vote vote) {
  const int result = vote == Vote::kAnd ? barrier.votes == barrier.arrived : barrier.votes;
  race::barrier_completes(&barrier);
  for (Thread* thread : barrier.waiting) {
    thread->vote = result;
    race::barrier_left(&barrier, *thread);
    wake(thread);
  }
  barrier.waiting.clear();
  barrier.arrived = barrier.votes = 0;
  barrier.by.assign((block.threads.size() + 63) / 64, 0);
  machine.idle_rounds = 0;
}

void check(const char* name, Barrier& barrier, int id, int threads, const Site& site) {
  Thread& self = *machine.self;
  const int limit = static_cast<int>(self.block->threads.size());
  const auto who = [&] { return describe(self) + " at " + barrier_name(name, id); };
  if (id < 0 || id > 15) fail(who() + ": a block has barriers 0 to 15", site);
  if (threads < 0 || threads % 32 != 0 || threads > (limit + 31) / 32 * 32) {
    fail(who() + ": its count must be a multiple of 32, at most " + std::to_string(limit) +
             ", got " + std::to_string(threads),
         site);
  }
  if (barrier.arrived > 0 && barrier.expected != threads) {
    fail(who() + " counts " + std::to_string(threads) + " threads, but those that arrived at " +
             describe(barrier.site) + " count " + std::to_string(barrier.expected),
         site);
  }
  if (barrier.by.empty()) barrier.by.assign((self.block->threads.size() + 63) / 64, 0);
  if (barrier.by[self.index / 64] >> (self.index % 64) & 1) {
    fail(who() + " arrives twice before it completes", site);
  }
  const bool first = static_cast<uint32_t>(barrier.by[self.index / 64] >> (self.index & 32)) == 0;
  uint32_t& line = self.warp->barrier_lines[id];
  if (!first && line != site.line()) {
    fail(who() + ", while others of its warp arrived there at line " + std::to_string(line) +
             ": a warp must reach a barrier as one",
         site);
  }
  line = site.line();
}

void arrive(Barrier& barrier, int threads, const Site& site) {
  Thread& self = *machine.self;
  barrier.expected = threads;
  barrier.site = site;
  barrier.by[self.index / 64] |= uint64_t{1} << (self.index % 64);
  ++barrier.arrived;
  race::barrier_reached(&barrier);
}

}  // namespace

int block_barrier(const char* name, int id, int threads, Vote vote, int value, const Site& site) {
  Thread& self = *machine.self;
  Block& block = *self.block;
  Barrier& barrier = block.barriers[id & 15];
  check(name, barrier, id, threads, site);
  arrive(barrier, threads, site);
  barrier.votes += value != 0;
  barrier.waiting.push_back(&self);
  if (barrier.arrived < awaited(block, barrier)) {
    suspend({.name = name, .site = site, .id = id});
  } else {
    complete(block, barrier, vote);
    maybe_preempt();
  }
  return vote == Vote::kOr ? self.vote != 0 : self.vote;
}

void block_arrive(const char* name, int id, int threads, const Site& site) {
  Block& block = *machine.self->block;
  Barrier& barrier = block.barriers[id & 15];
  check(name, barrier, id, threads, site);
  arrive(barrier, threads, site);
  if (barrier.arrived == awaited(block, barrier)) complete(block, barrier, Vote::kNone);
  maybe_preempt();
}

// A barrier without a count waits for the threads that are left.
void barrier_thread_exits(Block& block) {
  for (Barrier& barrier : block.barriers) {
    if (barrier.arrived > 0 && barrier.expected == 0 && barrier.arrived == block.live) {
      complete(block, barrier, Vote::kCount);
    }
  }
}

// ---- clusters ----

namespace {

Barrier& cluster_barrier(const Block& block) {
  return machine.group->blocks[block.first]->cluster_barrier;
}

int cluster_live(const Block& block) {
  int live = 0;
  for (uint32_t i = 0; i < machine.group->cluster_blocks; ++i) {
    live += machine.group->blocks[block.first + i]->live;
  }
  return live;
}

}  // namespace

void cluster_arrive(const Site& site) {
  Thread& self = *machine.self;
  if (self.in_cluster_barrier) {
    fail(describe(self) + " arrives twice at the cluster barrier without a wait between", site);
  }
  self.in_cluster_barrier = true;
  Barrier& barrier = cluster_barrier(*self.block);
  self.cluster_phase = barrier.expected;  // a cluster barrier has a number, not a count
  race::barrier_reached(&barrier);
  if (++barrier.arrived < cluster_live(*self.block)) return;
  race::barrier_completes(&barrier);
  ++barrier.expected;
  barrier.arrived = 0;
  for (Thread* thread : barrier.waiting) {
    race::barrier_left(&barrier, *thread);
    wake(thread);
  }
  barrier.waiting.clear();
}

void cluster_wait(const Site& site) {
  Thread& self = *machine.self;
  if (!self.in_cluster_barrier) {
    fail(describe(self) + " waits at the cluster barrier without having arrived", site);
  }
  self.in_cluster_barrier = false;
  Barrier& barrier = cluster_barrier(*self.block);
  if (barrier.expected != self.cluster_phase) return race::barrier_left(&barrier, self);
  barrier.waiting.push_back(&self);
  suspend({.name = "cluster_wait", .site = site});
}

uint32_t cluster_rank() { return machine.self->block->rank; }
uint32_t cluster_size() { return machine.group->cluster_blocks; }

// ---- registers ----

namespace {

void grant_registers(Block& block) {
  auto& waits = machine.group->register_waits;
  for (size_t i = 0; i < waits.size(); ++i) {
    Warp& warp = *waits[i]->warp;
    if (warp.block != &block || warp.wanted - warp.registers > block.free_registers) continue;
    block.free_registers -= warp.wanted - warp.registers;
    warp.registers = warp.wanted;
    wake(waits[i]);
    waits.erase(waits.begin() + static_cast<int64_t>(i--));
  }
}

void meet(uint32_t, void* const*) {}

}  // namespace

void set_registers(int count, bool more, const Site& site) {
  Thread& self = *machine.self;
  Warp& warp = *self.warp;
  const std::string who = describe(self) + " asks setmaxnreg for " + std::to_string(count);
  if (count < 24 || count > 256 || count % 8 != 0) {
    fail(who + ": must be a multiple of 8 between 24 and 256", site);
  }
  if (more ? count < warp.registers : count > warp.registers) {
    fail(who + (more ? " or more" : " or fewer") + ", but its warp has " +
             std::to_string(warp.registers) + " for each thread",
         site);
  }
  gather("setmaxnreg", Collective::kAligned, kAllLanes, nullptr, meet, site);
  if (self.lane != 0) {  // lane 0 speaks for the warp; the others wait for it at the next meeting
    gather("setmaxnreg", Collective::kAligned, kAllLanes, nullptr, meet, site);
    return;
  }
  warp.wanted = count;
  if (!more) {
    self.block->free_registers += warp.registers - count;
    warp.registers = count;
    grant_registers(*self.block);
  }
  while (warp.registers != count) {
    if (count - warp.registers <= self.block->free_registers) {
      self.block->free_registers -= count - warp.registers;
      warp.registers = count;
      break;
    }
    machine.group->register_waits.push_back(&self);
    suspend({.name = "setmaxnreg", .site = site, .registers = count});
  }
  gather("setmaxnreg", Collective::kAligned, kAllLanes, nullptr, meet, site);
}

}  // namespace flashkern::emulator
