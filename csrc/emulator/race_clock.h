// What the race detector's two halves share: shared memory (race.cpp), global memory and the order
// between blocks (race_global.cpp). Only they include this.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <vector>

#include "emulator/race.h"

namespace flashkern::emulator::race {

using Times = std::vector<uint32_t>;

// What is known of the threads of groups that have run before, by the group's number. Shared among
// the many who know the same.
using Past = std::shared_ptr<const std::map<uint32_t, std::shared_ptr<const Times>>>;

Past merged(const Past& a, const Past& b);

// What is known of the threads of this group: two vectors, see Detector; and of those before.
struct Clock {
  Times now;
  Past past;

  uint32_t& operator[](size_t i) { return now[i]; }
};

inline void merge(Clock& into, const Clock& from) {
  into.now.resize(std::max(into.now.size(), from.now.size()));
  for (size_t i = 0; i < from.now.size(); ++i) into.now[i] = std::max(into.now[i], from.now[i]);
  into.past = merged(into.past, from.past);
}

Clock& clock_of(const Thread& thread);
uint16_t number_of(const Access& access);
std::string describe(const Access& access);
std::string describe_access(uint16_t number);
std::string describe_thread(uint16_t number);  // of this group
void report(const std::string& text);          // the first one counts

// ---- race_global.cpp ----

void start_order(const Group& group);  // a group of the launch starts
enum class Kind { kRead, kWrite, kAtomic };
void touch_global(const void* p, size_t bytes, const Access& access, Kind kind);
void order_by_atomic(const void* p, Order order);

}  // namespace flashkern::emulator::race
