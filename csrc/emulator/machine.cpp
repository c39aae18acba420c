#include "emulator/machine.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "emulator/cuda_runtime.h"
#include "emulator/race.h"

namespace flashkern::emulator {

Machine machine;

namespace {

// Whose turn it is: what the kernel's code sees.
void take_turn(Thread* next) {
  machine.self = next;
  next->wait.name = nullptr;
  const uint32_t (&t)[3] = next->position, (&b)[3] = next->block->index;
  threadIdx = {t[0], t[1], t[2]};
  blockIdx = {b[0], b[1], b[2]};
}

void mark_ready(Warp* warp) {
  machine.group->ready[warp->slot / 64] |= uint64_t{1} << (warp->slot % 64);
}

void clear_ready(Warp* warp) {
  machine.group->ready[warp->slot / 64] &= ~(uint64_t{1} << (warp->slot % 64));
}

// A random one of the warps that can run, nullptr where none can.
Warp* ready_warp() {
  const std::vector<uint64_t>& ready = machine.group->ready;
  const size_t words = ready.size();
  const uint32_t random = random_bits();
  size_t word = words == 1 ? 0 : (random >> 8) % words;
  const int turn = static_cast<int>(random & 63);
  for (size_t i = 0; i < words; ++i, word = word + 1 == words ? 0 : word + 1) {
    if (ready[word] == 0) continue;
    const int bit = (std::countr_zero(std::rotr(ready[word], turn)) + turn) & 63;
    return machine.group->warps[word * 64 + static_cast<size_t>(bit)];
  }
  return nullptr;
}

Thread* runnable_lane(Warp* warp) {
  const int turn = static_cast<int>(random_bits() & 31);
  const int lane = (std::countr_zero(std::rotr(warp->runnable, turn)) + turn) & 31;
  return warp->threads[lane];
}

// Every try_wait gives up, as a GPU's does after its time limit. false: none does, or all have done
// nothing else for long.
bool time_out() {
  constexpr int kRounds = 100;
  if (++machine.idle_rounds > kRounds) return false;
  std::vector<Thread*> waiting;
  std::swap(waiting, machine.group->mbarrier_waits);
  bool any = false;
  for (Thread* thread : waiting) {
    if (thread->wait.timed) {
      thread->result = false;
      wake(thread);
      any = true;
    } else {
      machine.group->mbarrier_waits.push_back(thread);
    }
  }
  return any;
}

// Who runs now that the running thread does not. Throws where nobody can.
Thread* next_thread() {
  if (!machine.group->pending.empty() && random_bits() < machine.early) land_one();
  Warp* warp = machine.self->warp;
  if (warp->runnable == 0 || random_bits() < machine.preempt) {
    while ((warp = ready_warp()) == nullptr) {
      if (!land_one() && !time_out()) throw Error(deadlock_report());
    }
  }
  return runnable_lane(warp);
}

void switch_to(Thread* next) {
  Thread* from = machine.self;
  if (next == from) return;
  take_turn(next);
  switch_fiber(from->fiber, next->fiber);
}

void leave() {  // the kernel has returned
  Thread& thread = *machine.self;
  Warp& warp = *thread.warp;
  warp.exited |= 1u << thread.lane;
  warp.runnable &= ~(1u << thread.lane);
  if (warp.runnable == 0) clear_ready(&warp);
  --thread.block->live;
  --machine.group->live;
  thread_exits(thread);
  for (size_t i = 0; i < warp.gatherings.size(); ++i) {
    Gathering& waiting = warp.gatherings[i];
    if ((waiting.mask >> thread.lane & 1) == 0) continue;
    if (waiting.kind != Collective::kConverge) {
      fail(describe(thread) + " has returned, but its lane is awaited at " + waiting.name,
           waiting.site);
    }
    if (waiting.arrived == (waiting.mask & ~warp.exited)) {
      race::join(warp, waiting.arrived);
      wake(&warp, waiting.arrived);
      warp.gatherings.erase(warp.gatherings.begin() + static_cast<int64_t>(i--));
    }
  }
  barrier_thread_exits(*thread.block);
  machine.idle_rounds = 0;
}

void fiber_entry() {
  fiber_started();
  Thread* next = nullptr;
  try {
    machine.call(machine.context);
    leave();
    if (machine.group->live > 0) next = next_thread();
  } catch (...) {
    machine.group->error = std::current_exception();
  }
  Fiber& own = machine.self->fiber;
  if (next == nullptr) {
    switch_fiber(own, machine.caller, true);
  } else {
    take_turn(next);
    switch_fiber(own, next->fiber, true);
  }
  __builtin_unreachable();
}

}  // namespace

void suspend(const Wait& wait) {
  Thread& self = *machine.self;
  self.wait = wait;
  machine.idle_spins = 0;
  self.warp->runnable &= ~(1u << self.lane);
  if (self.warp->runnable == 0) clear_ready(self.warp);
  switch_to(next_thread());
}

void wake(Thread* thread) { wake(thread->warp, 1u << thread->lane); }

void wake(Warp* warp, uint32_t lanes) {
  warp->runnable |= lanes;
  if (warp->runnable != 0) mark_ready(warp);
}

void maybe_preempt() {
  if (random_bits() >= machine.preempt) return;
  switch_to(runnable_lane(ready_warp()));
}

void pause(const char* name, const Site& site) {
  constexpr int kSpins = 10000;  // for nothing: nobody else can run, nothing is under way
  Warp* other = ready_warp();
  int runnable = 0;
  for (Warp* warp : machine.group->warps) runnable += std::popcount(warp->runnable);
  if (runnable == 1 && !land_one() && ++machine.idle_spins > kSpins && !time_out()) {
    machine.self->wait = {name, site};
    throw Error(deadlock_report());
  }
  switch_to(runnable_lane(other));
}

uint32_t lane() { return machine.self->lane; }
uint32_t warp() { return machine.self->warp->index; }

void add_pending(std::function<void()> land, const Site& site) {
  machine.group->pending.push_back({std::move(land), site});
}

bool land_one() {
  std::vector<Pending>& pending = machine.group->pending;
  if (pending.empty()) return false;
  const size_t which = random_bits() % pending.size();
  std::swap(pending[which], pending.back());
  const Pending landing = std::move(pending.back());
  pending.pop_back();
  landing.land();
  machine.idle_rounds = 0;
  return true;
}

namespace {

void start_group() {
  Group& group = *machine.group;
  size_t number = 0;
  machine.idle_spins = 0;
  group.live = 0;
  group.warps.clear();
  for (auto& block : group.blocks) {
    for (Thread& thread : block->threads) {
      thread.number = static_cast<uint32_t>(number);
      prepare(thread.fiber, number++, fiber_entry);
    }
    for (Warp& warp : block->warps) {
      warp.slot = static_cast<uint32_t>(group.warps.size());
      group.warps.push_back(&warp);
    }
    group.live += block->live;
  }
  group.ready.assign((group.warps.size() + 63) / 64, 0);
  for (Warp* warp : group.warps) wake(warp, warp->present);
  machine.idle_rounds = 0;
  race::start_group();
}

}  // namespace

void run_group() {
  start_group();
  Group& group = *machine.group;
  Thread* first = runnable_lane(ready_warp());
  take_turn(first);
  switch_fiber(machine.caller, first->fiber);
  machine.self = nullptr;
  const std::string race = race::take_report();
  if (group.error || !race.empty()) {
    for (auto& block : group.blocks) {
      for (Thread& thread : block->threads) forget(thread);
    }
    group.pending.clear();
    group.mbarrier_waits.clear();
    group.register_waits.clear();
    const std::exception_ptr error = std::exchange(group.error, nullptr);
    if (!race.empty()) throw Error(race);
    std::rethrow_exception(error);
  }
  if (!group.pending.empty()) {
    const Site site = group.pending.front().site;
    group.pending.clear();
    fail("a block returned while an asynchronous copy into its shared memory was under way", site);
  }
}

}  // namespace flashkern::emulator
