// mbarriers: arrivals and bytes awaited, in the 8 bytes of shared memory that a GPU keeps them in.
#include <bit>
#include <cstring>

#include "emulator/machine.h"
#include "emulator/race.h"

namespace flashkern::emulator {
namespace {

struct State {
  uint64_t pending : 20;   // arrivals awaited in this phase
  uint64_t expected : 20;  // in each phase
  uint64_t parity : 1;     // of the phase that is under way
  int64_t bytes : 21;      // awaited
  uint64_t mark : 2;       // 2 in an initialised barrier; shared memory starts as ones
};
static_assert(sizeof(State) == 8);

State load(const uint64_t* barrier, const char* name, const Site& site) {
  if (owner(barrier) == nullptr || reinterpret_cast<uintptr_t>(barrier) % 8 != 0) {
    fail(describe(*machine.self) + " is at " + name +
             ": an mbarrier lies in shared memory at a multiple of 8",
         site);
  }
  const State state = std::bit_cast<State>(*barrier);
  if (state.mark != 2) {
    fail(describe(*machine.self) + " is at " + name + " of an mbarrier that is not initialised",
         site);
  }
  return state;
}

void store(uint64_t* barrier, State state) {
  if (state.pending == 0 && state.bytes == 0) {
    state.parity ^= 1;
    state.pending = state.expected;
    race::barrier_completes(barrier);
    auto& waits = machine.group->mbarrier_waits;
    for (size_t i = 0; i < waits.size(); ++i) {
      Thread* thread = waits[i];
      if (thread->wait.barrier != barrier || thread->wait.parity == state.parity) continue;
      thread->result = true;
      race::barrier_left(barrier, *thread);
      wake(thread);
      waits.erase(waits.begin() + static_cast<int64_t>(i--));
    }
    machine.idle_rounds = 0;
  }
  *barrier = std::bit_cast<uint64_t>(state);
}

State arrived(State state, uint32_t count, const char* name, const Site& site) {
  if (count > state.pending) {
    fail(describe(*machine.self) + " is at " + name + ": " + std::to_string(count) +
             " arrivals, but the phase awaits only " + std::to_string(state.pending),
         site);
  }
  state.pending -= count;
  return state;
}

}  // namespace

void mbarrier_init(uint64_t* barrier, uint32_t count, const Site& site) {
  check_shared(barrier, 8, 8, "mbarrier_init", site);
  if (count == 0 || count >= 1u << 20) {
    fail("mbarrier_init: count must be between 1 and 2^20 - 1, got " + std::to_string(count), site);
  }
  race::write(barrier, 8, {"mbarrier_init", site});
  *barrier = std::bit_cast<uint64_t>(State{count, count, 0, 0, 2});
}

void mbarrier_invalidate(uint64_t* barrier, const Site& site) {
  load(barrier, "mbarrier_invalidate", site);
  *barrier = ~uint64_t{0};
}

void mbarrier_arrive(uint64_t* barrier, uint32_t count, const Site& site) {
  State state = load(barrier, "mbarrier_arrive", site);
  race::read(barrier, 8, {"mbarrier_arrive", site});
  state = arrived(state, count, "mbarrier_arrive", site);
  race::barrier_reached(barrier);
  store(barrier, state);
  maybe_preempt();
}

void mbarrier_expect(uint64_t* barrier, uint32_t bytes, bool arrive, const Site& site) {
  State state = load(barrier, "mbarrier_expect_tx", site);
  race::read(barrier, 8, {"mbarrier_expect_tx", site});
  if (bytes >= 1u << 20) fail("mbarrier_expect_tx: more than 2^20 - 1 bytes", site);
  state.bytes += bytes;
  if (arrive) state = arrived(state, 1, "mbarrier_arrive_expect_tx", site);
  race::barrier_reached(barrier);
  store(barrier, state);
  maybe_preempt();
}

void mbarrier_complete_bytes(uint64_t* barrier, uint32_t bytes, const Site& site) {
  State state = load(barrier, "complete_tx", site);
  state.bytes -= bytes;
  store(barrier, state);
}

void mbarrier_land(uint64_t* barrier, const Site& site) {
  store(barrier, arrived(load(barrier, "cp_async_arrive", site), 1, "cp_async_arrive", site));
}

namespace {

bool wait(uint64_t* barrier, uint32_t parity, bool timed, const char* name, const Site& site) {
  const State state = load(barrier, name, site);
  Thread& self = *machine.self;
  if (state.parity != (parity & 1)) {
    race::barrier_left(barrier, self);
    maybe_preempt();
    return true;
  }
  if (timed && (random_bits() & 7) == 0) {  // a GPU may give up as early as it likes
    pause(name, site);
    return false;
  }
  machine.group->mbarrier_waits.push_back(&self);
  suspend({.name = name, .site = site, .barrier = barrier, .parity = parity & 1, .timed = timed});
  return self.result;
}

}  // namespace

bool mbarrier_try(uint64_t* barrier, uint32_t parity, const Site& site) {
  return wait(barrier, parity, true, "mbarrier_try_wait", site);
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity, const Site& site) {
  wait(barrier, parity, false, "mbarrier_wait", site);
}

std::string mbarrier_state(const uint64_t* barrier) {
  const State state = std::bit_cast<State>(*barrier);
  return "phase " + std::to_string(state.parity) + ", awaits " + std::to_string(state.pending) +
         " arrivals and " + std::to_string(state.bytes) + " bytes";
}

}  // namespace flashkern::emulator
