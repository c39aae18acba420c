// Races in global memory, within one launch. A grid's blocks run one after another here, side by
// side on a GPU: what one writes another may touch only behind a release and an acquire, by an
// atomic with that order or by __threadfence on both sides of a relaxed one.
#include <array>
#include <cstdio>
#include <unordered_map>

#include "emulator/race_clock.h"

namespace flashkern::emulator::race {
namespace {

struct Stamp {  // when somebody did something
  uint32_t group, time;
  uint16_t thread, access;
};

// Two bytes: who last wrote them, and two of those who have read them since.
struct Cell {
  uint32_t launch;
  bool atomic;
  Stamp write, read[2];
};

constexpr uintptr_t kPage = 4096;
constexpr size_t kMostPages = 4096;
using Page = std::array<Cell, kPage / 2>;

struct Release {
  uint32_t group = 0;
  Clock clock;
};

struct Global {
  uint32_t launch = 1, group = 0;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  std::unordered_map<const void*, Release> released;  // by word
  std::vector<Clock> fenced, seen;  // of each thread: what a fence covers; what one would bring
  std::vector<std::string> blocks;  // by group
};

Global global;

Past with(const Past& past, uint32_t group, const Times& times) {
  std::map<uint32_t, std::shared_ptr<const Times>> one;
  if (!times.empty()) one[group] = std::make_shared<const Times>(times);
  return merged(past, std::make_shared<const decltype(one)>(std::move(one)));
}

// What has been released at a word, seen from this group.
Release& released(const void* p) {
  Release& r = global.released[p];
  if (r.group != global.group) {
    r = {global.group, {{}, with(r.clock.past, r.group, r.clock.now)}};
  }
  return r;
}

bool ordered(const Stamp& stamp) {
  Clock& clock = clock_of(*machine.self);
  if (stamp.group == global.group) return stamp.time <= clock[stamp.thread];
  if (clock.past == nullptr) return stamp.time == 0;
  const auto found = clock.past->find(stamp.group);
  return stamp.time == 0 ||
         (found != clock.past->end() && stamp.time <= (*found->second)[stamp.thread]);
}

void tell(const char* what, const Stamp& stamp, const void* p, const Access& now) {
  const std::string who = stamp.group == global.group ? describe_thread(stamp.thread)
                                                      : "thread " + std::to_string(stamp.thread) +
                                                            " of " + global.blocks[stamp.group];
  char at[32];
  std::snprintf(at, sizeof at, "%p", p);
  report("emulator: race in global memory at " + std::string(at) + ":\n  " +
         emulator::describe(*machine.self) + ", " + describe(now) + "\n  " + what + " " + who +
         ", " + describe_access(stamp.access));
}

Cell& cell_at(uintptr_t address) {
  auto& page = global.pages[address / kPage];
  if (page == nullptr) page = std::make_unique<Page>();
  Cell& cell = (*page)[address % kPage / 2];
  if (cell.launch != global.launch)
    cell = {.launch = global.launch, .atomic = false, .write = {}, .read = {}};
  return cell;
}

}  // namespace

Past merged(const Past& a, const Past& b) {
  if (a == b || b == nullptr || b->empty()) return a;
  if (a == nullptr || a->empty()) return b;
  auto all = *a;
  bool more = false;
  for (const auto& [group, times] : *b) {
    auto& own = all[group];
    if (own == times) continue;
    more = true;
    if (own == nullptr) {
      own = times;
    } else {
      Times both = *own;
      for (size_t i = 0; i < both.size(); ++i) both[i] = std::max(both[i], (*times)[i]);
      own = std::make_shared<const Times>(std::move(both));
    }
  }
  return more ? std::make_shared<const decltype(all)>(std::move(all)) : a;
}

void start_launch() {
  ++global.launch;
  global.group = 0;
  global.released.clear();
  global.blocks.assign(1, "");
  if (global.pages.size() > kMostPages) global.pages.clear();
}

void start_order(const Group& group) {
  ++global.group;
  size_t threads = 0;
  for (const auto& block : group.blocks) threads += block->threads.size();
  global.fenced.assign(threads, {});
  global.seen.assign(threads, {});
  global.blocks.push_back(emulator::describe(*group.blocks[0]));
}

void touch_global(const void* p, size_t bytes, const Access& access, Kind kind) {
  Thread& self = *machine.self;
  const Stamp now{global.group, clock_of(self)[self.number], static_cast<uint16_t>(self.number),
                  number_of(access)};
  const auto first = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t at = first / 2 * 2; at < first + bytes; at += 2) {
    Cell& cell = cell_at(at);
    const bool both_atomic = kind == Kind::kAtomic && cell.atomic;
    const auto* address = reinterpret_cast<const void*>(at);
    if (bytes > 1 && !both_atomic && !ordered(cell.write)) {
      tell("is not ordered after the write of", cell.write, address, access);
    }
    if (kind == Kind::kRead) {
      const Stamp& old = cell.read[0];
      const bool own = old.group == now.group && old.thread == now.thread;
      cell.read[own || ordered(old) ? 0 : 1] = now;
      continue;
    }
    for (const Stamp& read : cell.read) {
      if (bytes > 1 && !ordered(read))
        tell("is not ordered after the read of", read, address, access);
    }
    cell.write = now;
    cell.read[0] = cell.read[1] = {};
    cell.atomic = kind == Kind::kAtomic;
  }
}

void order_by_atomic(const void* p, Order order) {
  Thread& self = *machine.self;
  Clock& clock = clock_of(self);
  Release& word = released(p);
  merge(acquires(order) ? clock : global.seen[self.number], word.clock);
  if (order == Order::kAcquire) return;  // a load
  merge(word.clock, releases(order) ? clock : global.fenced[self.number]);
  ++clock[self.number];
}

void fence() {
  if (!active || machine.self == nullptr) return;
  Thread& self = *machine.self;
  Clock& clock = clock_of(self);
  merge(clock, global.seen[self.number]);
  global.fenced[self.number] = clock;
  ++clock[self.number];
}

}  // namespace flashkern::emulator::race
