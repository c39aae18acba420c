#include "emulator/race.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <unordered_map>
#include <utility>

#include "emulator/race_clock.h"

namespace flashkern::emulator::race {
namespace {

// Who last wrote two bytes of shared memory, and two of those who have read them since.
struct Cell {
  uint32_t write_clock, read_clock[2];
  uint16_t writer, write_access, reader[2], read_access[2];
  bool in_flight, asynchronous, atomic;
};

// A thread's clock is two vectors: what it knows the others have done, and what of that is known to
// be visible to the async proxy. The tensor cores of each warp count as one more thread.
struct Detector {
  size_t threads = 0, agents = 0;  // agents: the threads, then the warps' tensor cores
  std::vector<Clock> clocks;
  struct Handover {
    Clock arriving, complete;
  };
  std::unordered_map<const void*, Handover> handovers;
  std::vector<std::vector<Cell>> shared;  // of each block of the group
  std::vector<Access> accesses{{}};       // by number; 0: none
  std::unordered_map<uintptr_t, uint16_t> numbers;
  std::string report;
};

Detector detector;

uint32_t& own_time(const Thread& thread) { return clock_of(thread)[thread.number]; }

// file:line of a load or store, by addr2line where there is one.
std::string source_line(const void* pc) {
  Dl_info info;
  if (dladdr(pc, &info) == 0) return "an unknown place";
  const auto offset = static_cast<const char*>(pc) - static_cast<char*>(info.dli_fbase) - 1;
  char command[1024], line[512] = "";
  std::snprintf(command, sizeof command, "addr2line -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
                static_cast<size_t>(offset));
  if (FILE* pipe = popen(command, "r")) {
    if (std::fgets(line, sizeof line, pipe) == nullptr) line[0] = 0;
    pclose(pipe);
  }
  std::string text = line;
  text.erase(std::min(text.find_first_of(" \n"), text.size()));
  if (text.empty() || text[0] == '?') {
    std::snprintf(line, sizeof line, "%s+0x%zx", info.dli_fname, static_cast<size_t>(offset));
    text = line;
  }
  return text.substr(text.rfind('/') + 1);
}

}  // namespace

Clock& clock_of(const Thread& thread) { return detector.clocks[thread.number]; }

uint16_t number_of(const Access& access) {
  const auto key = access.name == nullptr
                       ? reinterpret_cast<uintptr_t>(access.pc)
                       : (reinterpret_cast<uintptr_t>(access.name) << 16) ^
                             reinterpret_cast<uintptr_t>(access.site.file_name()) ^
                             access.site.line() * uintptr_t{0x9e3779b97f4a7c15u};
  const auto [found, fresh] = detector.numbers.try_emplace(key, detector.accesses.size());
  if (fresh) detector.accesses.push_back(access);
  return found->second;
}

std::string describe(const Access& access) {
  if (access.name != nullptr) return access.name + (" at " + emulator::describe(access.site));
  return "the access at " + source_line(access.pc);
}

std::string describe_thread(uint16_t number) {
  for (const auto& block : machine.group->blocks) {
    for (const Thread& thread : block->threads) {
      if (thread.number == number) return emulator::describe(thread);
    }
  }
  const Warp& warp = *machine.group->warps[number - detector.threads];
  return "the warp of " + emulator::describe(*warp.threads[0]);
}

std::string describe_access(uint16_t number) { return describe(detector.accesses[number]); }

void report(const std::string& text) {
  if (detector.report.empty()) detector.report = text;
}

namespace {

void tell(const void* p, const char* what, uint16_t thread, uint16_t access, const Access& now) {
  if (!detector.report.empty()) return;
  const Block& block = *owner(p);
  report("emulator: race at shared + " +
         std::to_string(static_cast<const char*>(p) - block.shared) + " of " +
         emulator::describe(block) + ":\n  " + emulator::describe(*machine.self) + ", " +
         describe(now) + "\n  " + what + " " + describe_thread(thread) + ", " +
         describe_access(access));
}

bool ordered(uint32_t time, uint16_t thread) { return time <= clock_of(*machine.self)[thread]; }

bool watched(const void* p) { return active && machine.self != nullptr && owner(p) != nullptr; }

// A thread's own stack is nobody else's; on another's, results of a collective are left.
bool watched_globally(const void* p) {
  return active && machine.self != nullptr && owner(p) == nullptr && !on_stack(p);
}

template <class F>
void for_cells(const void* p, size_t bytes, F visit) {
  Block* block = owner(p);
  const Thread& first = block->threads[0];
  auto& cells = detector.shared[first.number / block->threads.size()];
  const auto offset = static_cast<size_t>(static_cast<const char*>(p) - block->shared);
  const size_t end = std::min((offset + bytes + 1) / 2, cells.size());
  for (size_t i = offset / 2; i < end; ++i) visit(cells[i], block->shared + 2 * i);
}

void record_read(Cell& cell, uint16_t access, size_t reader, uint32_t time) {
  int slot = 1;
  if (cell.reader[0] == reader || ordered(cell.read_clock[0], cell.reader[0])) slot = 0;
  cell.read_clock[slot] = time;
  cell.reader[slot] = static_cast<uint16_t>(reader);
  cell.read_access[slot] = access;
}

void check_write_before(const Cell& cell, const void* p, const Access& access) {
  if (cell.in_flight) {
    tell(p, "may find there what is still under way from", cell.writer, cell.write_access, access);
  } else if (!ordered(cell.write_clock, cell.writer)) {
    tell(p, "is not ordered after the write of", cell.writer, cell.write_access, access);
  }
}

void check_reads_before(const Cell& cell, const void* p, const Access& access) {
  for (int i = 0; i < 2; ++i) {
    if (ordered(cell.read_clock[i], cell.reader[i])) continue;
    tell(p, "is not ordered after the read of", cell.reader[i], cell.read_access[i], access);
  }
}

void record_write(Cell& cell, uint16_t access) {
  cell = {};
  cell.write_clock = own_time(*machine.self);
  cell.writer = static_cast<uint16_t>(machine.self->number);
  cell.write_access = access;
}

}  // namespace

void start_group() {
  if (!active) return;
  const auto& blocks = machine.group->blocks;
  size_t threads = 0;
  for (const auto& block : blocks) threads += block->threads.size();
  detector.threads = threads;
  detector.agents = threads + machine.group->warps.size();
  detector.report.clear();
  detector.handovers.clear();
  detector.clocks.resize(threads);
  for (size_t i = 0; i < threads; ++i) {
    detector.clocks[i] = {Times(2 * detector.agents, 0), nullptr};
    detector.clocks[i][i] = 1;
  }
  start_order(*machine.group);
  detector.shared.resize(blocks.size());
  for (size_t i = 0; i < blocks.size(); ++i) {
    detector.shared[i].assign((blocks[i]->shared_bytes + 1) / 2, {});
  }
}

std::string take_report() { return std::exchange(detector.report, {}); }

void barrier_reached(const void* key) {
  if (!active) return;
  merge(detector.handovers[key].arriving, clock_of(*machine.self));
  ++own_time(*machine.self);
}

void barrier_completes(const void* key) {
  if (!active) return;
  Detector::Handover& handover = detector.handovers[key];
  merge(handover.complete, handover.arriving);
  handover.arriving = {};
}

void barrier_left(const void* key, const Thread& thread) {
  if (active) merge(clock_of(thread), detector.handovers[key].complete);
}

void join(const Warp& warp, uint32_t lanes) {
  if (!active) return;
  Clock all;
  for (int i = 0; i < 32; ++i) {
    if (lanes >> i & 1) merge(all, clock_of(*warp.threads[i]));
  }
  for (int i = 0; i < 32; ++i) {
    if ((lanes >> i & 1) == 0) continue;
    clock_of(*warp.threads[i]) = all;
    ++own_time(*warp.threads[i]);
  }
}

void fence_async() {
  if (!active) return;
  Clock& clock = clock_of(*machine.self);
  for (size_t i = 0; i < detector.agents; ++i) clock[detector.agents + i] = clock[i];
  ++own_time(*machine.self);
}

// A single byte is recorded but not checked: its neighbour, which shares its cell, may be another
// thread's.
void read(const void* p, size_t bytes, const Access& access) {
  if (watched_globally(p)) return touch_global(p, bytes, access, Kind::kRead);
  if (!watched(p)) return;
  const uint16_t number = number_of(access);
  for_cells(p, bytes, [&](Cell& cell, const void* at) {
    if (bytes > 1) check_write_before(cell, at, access);
    record_read(cell, number, machine.self->number, own_time(*machine.self));
  });
}

void write(const void* p, size_t bytes, const Access& access) {
  if (watched_globally(p)) return touch_global(p, bytes, access, Kind::kWrite);
  if (!watched(p)) return;
  const uint16_t number = number_of(access);
  for_cells(p, bytes, [&](Cell& cell, const void* at) {
    if (bytes > 1) {
      check_write_before(cell, at, access);
      check_reads_before(cell, at, access);
    }
    record_write(cell, number);
  });
}

void atomic(const void* p, size_t bytes, const Access& access, Order order) {
  if (watched_globally(p)) {
    touch_global(p, bytes, access, Kind::kAtomic);
    return order_by_atomic(p, order);
  }
  if (!watched(p)) return;
  const uint16_t number = number_of(access);
  for_cells(p, bytes, [&](Cell& cell, const void* at) {
    if (!cell.atomic) check_write_before(cell, at, access);
    check_reads_before(cell, at, access);
    record_write(cell, number);
    cell.atomic = true;
  });
}

namespace {

void read_by(const void* p, size_t bytes, const Access& access, size_t reader, uint32_t time) {
  const uint16_t number = number_of(access);
  for_cells(p, bytes, [&](Cell& cell, const void* at) {
    check_write_before(cell, at, access);
    const uint32_t fenced = clock_of(*machine.self)[detector.agents + cell.writer];
    if (!cell.asynchronous && cell.write_clock > fenced) {
      tell(at, "reads through the async proxy, without fence_async since the write of", cell.writer,
           cell.write_access, access);
    }
    record_read(cell, number, reader, time);
  });
}

}  // namespace

void read_async(const void* p, size_t bytes, const Access& access) {
  if (!watched(p)) return;
  read_by(p, bytes, access, machine.self->number, own_time(*machine.self));
}

void read_wgmma(const void* p, size_t bytes, const Access& access, const Warp& warp,
                uint32_t time) {
  if (watched(p)) read_by(p, bytes, access, detector.threads + warp.slot, time);
}

void wgmma_done(const Warp& warp, uint32_t time) {
  if (!active) return;
  for (const Thread* thread : warp.threads) {
    uint32_t& known = clock_of(*thread)[detector.threads + warp.slot];
    known = std::max(known, time);
  }
}

void in_flight(const void* p, size_t bytes, const Access& access) {
  if (!watched(p)) return;
  const uint16_t number = number_of(access);
  for_cells(p, bytes, [&](Cell& cell, const void* at) {
    check_write_before(cell, at, access);
    check_reads_before(cell, at, access);
    record_write(cell, number);
    cell.in_flight = true;
  });
}

// A cp.async lands as the write of the thread that waited for it. What TMA lands counts as written
// when it was issued, and needs no fence for the async proxy that it came through.
void landed(const void* p, size_t bytes, bool by_running_thread) {
  if (!watched(p)) return;
  for_cells(p, bytes, [&](Cell& cell, const void*) {
    cell.in_flight = false;
    cell.asynchronous = !by_running_thread;
    if (by_running_thread) cell.write_clock = own_time(*machine.self);
  });
}

}  // namespace flashkern::emulator::race
