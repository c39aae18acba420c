// Dynamic shared memory and cp.async.
#include <sys/mman.h>

#include <array>
#include <cstring>
#include <new>

#include "emulator/machine.h"
#include "emulator/race.h"
#include "emulator/sanitizer.h"

namespace flashkern::emulator {
namespace {

constexpr size_t kWindow = 256 << 10;  // one block's, with room for the canary
constexpr size_t kCanaryBytes = 1024;
constexpr unsigned char kCanary = 0xa5;
constexpr uint32_t kBase = 1024;  // of the window, as a GPU counts

// Windows lie one after another, a page without access between two.
char* window(size_t slot) {
  static std::vector<char*> windows;
  while (windows.size() <= slot) {
    constexpr size_t kGuard = 4096;
    void* p = mmap(nullptr, kWindow + kGuard, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mprotect(static_cast<char*>(p) + kWindow, kGuard, PROT_NONE);
    windows.push_back(static_cast<char*>(p));
  }
  return windows[slot];
}

}  // namespace

char* open_shared(size_t slot, size_t bytes) {
  char* shared = window(slot);
  unpoison(shared, kWindow);
  std::memset(shared, 0xff, bytes);
  std::memset(shared + bytes, kCanary, kCanaryBytes);
  poison(shared + bytes, kWindow - bytes);
  return shared;
}

void close_shared(const Block& block) {
  unpoison(block.shared, kWindow);
  for (size_t i = 0; i < kCanaryBytes; ++i) {
    if (static_cast<unsigned char>(block.shared[block.shared_bytes + i]) != kCanary) {
      throw Error("emulator: " + describe(block) + " wrote at shared + " +
                  std::to_string(block.shared_bytes + i) + ", beyond its " +
                  std::to_string(block.shared_bytes) + " bytes of dynamic shared memory");
    }
  }
}

Block* owner(const void* p) {
  for (const auto& block : machine.group->blocks) {
    const auto offset = static_cast<size_t>(static_cast<const char*>(p) - block->shared);
    if (offset < block->shared_bytes) return block.get();
  }
  return nullptr;
}

void* shared_memory(size_t bytes, size_t alignment, const Site& site) {
  const Block& block = *machine.self->block;
  if (bytes > block.shared_bytes || alignment > kBase) {
    fail("the kernel uses " + std::to_string(bytes) +
             " bytes of dynamic shared memory, aligned to " + std::to_string(alignment) +
             ", but the launch gave " + std::to_string(block.shared_bytes),
         site);
  }
  return block.shared;
}

uint32_t shared_address(const void* p, const Site& site) {
  const Block& block = *machine.self->block;
  const auto offset = static_cast<const char*>(p) - block.shared;
  if (offset < 0 || static_cast<size_t>(offset) > block.shared_bytes) {
    fail(describe(*machine.self) + " takes the shared address of memory that is not its block's",
         site);
  }
  return kBase + static_cast<uint32_t>(offset);
}

void* shared_pointer(uint32_t address, size_t bytes, const char* name, const Site& site) {
  const Block& block = *machine.self->block;
  if (address < kBase || address - kBase + bytes > block.shared_bytes) {
    fail(describe(*machine.self) + " is at " + name + ": shared address " +
             std::to_string(address) + " is outside the block's " +
             std::to_string(block.shared_bytes) + " bytes",
         site);
  }
  return block.shared + (address - kBase);
}

void check_shared(const void* p, size_t bytes, size_t alignment, const char* name,
                  const Site& site) {
  const Block& block = *machine.self->block;
  const auto offset = static_cast<const char*>(p) - block.shared;
  if (offset < 0 || static_cast<size_t>(offset) + bytes > block.shared_bytes) {
    fail(describe(*machine.self) + " is at " + name + ": shared + " + std::to_string(offset) +
             " is outside the block's " + std::to_string(block.shared_bytes) +
             " bytes of dynamic shared memory",
         site);
  }
  if (static_cast<size_t>(offset) % alignment != 0) {
    fail(describe(*machine.self) + " is at " + name + ": shared + " + std::to_string(offset) +
             " is not a multiple of " + std::to_string(alignment),
         site);
  }
}

void* in_cluster(const void* shared, uint32_t rank, const Site& site) {
  const Block& block = *machine.self->block;
  if (rank >= machine.group->cluster_blocks) {
    fail("cluster rank " + std::to_string(rank) + " of " +
             std::to_string(machine.group->cluster_blocks),
         site);
  }
  check_shared(shared, 1, 1, "mapa", site);
  const auto offset = static_cast<const char*>(shared) - block.shared;
  return machine.group->blocks[block.first + rank]->shared + offset;
}

void on_read(const void* p, size_t bytes, const char* name, const Site& site) {
  if (race::active) race::read(p, bytes, {name, site});
}

void on_write(const void* p, size_t bytes, const char* name, const Site& site) {
  if (race::active) race::write(p, bytes, {name, site});
}

void on_atomic(const void* p, size_t bytes, const Site& site, Order order) {
  if (race::active) race::atomic(p, bytes, {"an atomic", site}, order);
}

void fence() { race::fence(); }
void fence_async() { race::fence_async(); }

// ---- cp.async ----

namespace {

void land(const Copy& copy, bool waited) {
  if (copy.bytes == 16) {  // nearly always
    std::memcpy(copy.shared, copy.global, 16);
    return race::landed(copy.shared, 16, waited);
  }
  std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
  std::memset(static_cast<char*>(copy.shared) + copy.bytes, 0,
              static_cast<size_t>(copy.size - copy.bytes));
  race::landed(copy.shared, static_cast<size_t>(copy.size), waited);
}

}  // namespace

void copy_async(void* shared, const void* global, int size, int bytes, const Site& site) {
  Thread& self = *machine.self;
  check_shared(shared, static_cast<size_t>(size), static_cast<size_t>(size), "cp.async", site);
  if (bytes < 0 || bytes > size) {
    fail("cp.async of " + std::to_string(size) + " bytes: cannot take " + std::to_string(bytes),
         site);
  }
  if (bytes > 0 && reinterpret_cast<uintptr_t>(global) % static_cast<size_t>(size) != 0) {
    fail(describe(self) + " is at cp.async: its source is not aligned to " + std::to_string(size) +
             " bytes",
         site);
  }
  race::read(global, static_cast<size_t>(bytes), {"cp.async", site});
  race::in_flight(shared, static_cast<size_t>(size), {"cp.async", site});
  const auto poison = [shared](auto ones) { std::memcpy(shared, &ones, sizeof(ones)); };
  const uint64_t ones = ~uint64_t{0};
  if (size == 4) poison(static_cast<uint32_t>(ones));
  if (size == 8) poison(ones);
  if (size == 16) poison(std::array{ones, ones});
  self.copies.push_back({shared, global, size, bytes, self.copy_group, site});
}

void copy_commit() { ++machine.self->copy_group; }

// groups_left < 0: all, those not committed too.
void copy_wait(int groups_left, const Site&) {
  Thread& self = *machine.self;
  size_t landing = 0;
  while (landing < self.copies.size() &&
         (groups_left < 0 ||
          self.copies[landing].group + static_cast<uint32_t>(groups_left) < self.copy_group)) {
    land(self.copies[landing++], true);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<int64_t>(landing));
  maybe_preempt();
}

void copy_arrive(uint64_t* barrier, const Site& site) {
  std::vector<Copy> copies = machine.self->copies;
  race::barrier_reached(barrier);
  add_pending(
      [copies = std::move(copies), barrier, site] {
        for (const Copy& copy : copies) land(copy, false);
        mbarrier_land(barrier, site);
      },
      site);
}

}  // namespace flashkern::emulator
