// What an error says: who, where, and for a deadlock, everybody.
#include <map>

#include "emulator/machine.h"

namespace flashkern::emulator {
namespace {

std::string triple(const uint32_t (&v)[3]) {
  return "(" + std::to_string(v[0]) + "," + std::to_string(v[1]) + "," + std::to_string(v[2]) + ")";
}

// "0-31, 64": sorted numbers as ranges.
std::string ranges(const std::vector<uint32_t>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    size_t end = i + 1;
    while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) ++end;
    text += (text.empty() ? "" : ", ") + std::to_string(numbers[i]);
    if (end - i > 1) text += "-" + std::to_string(numbers[end - 1]);
    i = end;
  }
  return text;
}

std::string describe_wait(const Wait& wait, const Block& block) {
  std::string text = wait.name;
  if (wait.id > 0) text += " " + std::to_string(wait.id);
  if (wait.id >= 0) {
    const Barrier& barrier = block.barriers[wait.id];
    const int awaited = barrier.expected > 0 ? barrier.expected : block.live;
    text += ", " + std::to_string(barrier.arrived) + " of " + std::to_string(awaited) + " arrived";
  }
  if (wait.barrier != nullptr) {
    text += "(parity " + std::to_string(wait.parity) + ") at shared + " +
            std::to_string(reinterpret_cast<const char*>(wait.barrier) - block.shared) + ": " +
            mbarrier_state(wait.barrier);
  }
  if (wait.registers > 0) {
    text += " for " + std::to_string(wait.registers) + " registers, " +
            std::to_string(block.free_registers) + " free";
  }
  return text + " (" + emulator::describe(wait.site) + ")";
}

}  // namespace

std::string describe(const Site& site) {
  std::string file = site.file_name();
  const size_t slash = file.rfind('/');
  if (slash != std::string::npos) file.erase(0, slash + 1);
  return file + ":" + std::to_string(site.line());
}

std::string describe(const Thread& thread) {
  return "thread " + triple(thread.position) + " of " + describe(*thread.block);
}

std::string describe(const Block& block) { return "block " + triple(block.index); }

void fail(const std::string& message, const Site& site) {
  throw Error("emulator: " + describe(site) + ": " + message);
}

std::string deadlock_report() {
  std::string text = "emulator: deadlock";
  for (const auto& block : machine.group->blocks) {
    std::map<std::string, std::vector<uint32_t>> waits;
    for (const Thread& thread : block->threads) {
      if (thread.warp->exited >> thread.lane & 1) {
        waits["have returned"].push_back(thread.index);
      } else if (thread.wait.name != nullptr) {
        waits["wait at " + describe_wait(thread.wait, *block)].push_back(thread.index);
      }
    }
    text += "\n  " + describe(*block) + ":";
    for (const auto& [where, threads] : waits) {
      text += "\n    threads " + ranges(threads) + " " + where;
    }
  }
  return text;
}

}  // namespace flashkern::emulator
