// A launch: checks what a GPU checks, then runs the grid, one cluster after another.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <optional>

#include "emulator/cuda_runtime.h"
#include "emulator/device.h"
#include "emulator/machine.h"
#include "emulator/race.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace flashkern::emulator {
namespace {

std::optional<uint64_t> chosen_seed;
std::atomic<uint64_t> launches;

// Asked for at every launch: a test may change the variable between two.
uint64_t seed() {
  if (chosen_seed) return *chosen_seed;
  const char* text = std::getenv("FLASHKERN_EMULATOR_SEED");
  return text != nullptr ? std::strtoull(text, nullptr, 10) : 1;
}

uint64_t product(const uint32_t (&v)[3]) { return uint64_t{v[0]} * v[1] * v[2]; }

void position(uint64_t i, const uint32_t (&extent)[3], uint32_t (&out)[3]) {
  out[0] = static_cast<uint32_t>(i % extent[0]);
  out[1] = static_cast<uint32_t>(i / extent[0] % extent[1]);
  out[2] = static_cast<uint32_t>(i / extent[0] / extent[1]);
}

[[noreturn]] void refuse(const std::string& why) { throw Error("emulator: launch: " + why); }

void check(const void* kernel, const Shape& shape) {
  const Device& device = current_device();
  const uint64_t threads = product(shape.block), blocks = product(shape.cluster);
  if (product(shape.grid) == 0 || threads == 0) refuse("an empty grid or block");
  if (shape.grid[1] > 65535 || shape.grid[2] > 65535) refuse("grid.y or grid.z above 65535");
  if (threads > 1024) refuse(std::to_string(threads) + " threads in a block, at most 1024");
  if (shape.shared_bytes > allowed_shared_bytes(kernel)) {
    refuse(std::to_string(shape.shared_bytes) + " bytes of dynamic shared memory, allowed " +
           std::to_string(allowed_shared_bytes(kernel)));
  }
  if (blocks > 1 && device.major < 9) refuse("clusters need compute capability 9.0");
  if (blocks > 8) refuse("a portable cluster has at most 8 blocks");
  for (int i = 0; i < 3; ++i) {
    if (shape.grid[i] % shape.cluster[i] != 0) refuse("the grid is not a whole number of clusters");
  }
}

void prepare_warps(Block& block, size_t threads) {
  const int registers = std::min<int>(255, static_cast<int>(65536 / threads)) / 8 * 8;
  for (size_t i = 0; i < block.warps.size(); ++i) {
    Warp& warp = block.warps[i];
    warp.block = &block;
    warp.index = static_cast<uint32_t>(i);
    const size_t lanes = std::min<size_t>(32, threads - 32 * i);
    warp.present = lanes == 32 ? kAllLanes : (1u << lanes) - 1;
    warp.exited = warp.runnable = 0;
    warp.registers = registers;
    warp.gatherings.clear();
    warp.products.clear();
    warp.product_group = 0;
    warp.issued = 0;
    warp.fenced = false;
  }
}

void prepare_block(Block& block, const Shape& shape, size_t slot) {
  const size_t threads = product(shape.block);
  block.threads.resize(threads);
  block.warps.resize((threads + 31) / 32);
  block.warpgroups.assign((threads + 127) / 128, {});
  for (Barrier& barrier : block.barriers) barrier = {};
  block.cluster_barrier = {};
  block.live = static_cast<int>(threads);
  block.free_registers = 0;
  block.shared_bytes = shape.shared_bytes;
  block.shared = open_shared(slot, shape.shared_bytes);
  prepare_warps(block, threads);
  for (size_t i = 0; i < threads; ++i) {
    Thread& thread = block.threads[i];
    thread.block = &block;
    thread.warp = &block.warps[i / 32];
    thread.lane = static_cast<uint32_t>(i % 32);
    thread.index = static_cast<uint32_t>(i);
    thread.wait = {};
    thread.in_cluster_barrier = false;
    thread.copies.clear();
    thread.stores.clear();
    thread.copy_group = thread.store_group = 0;
    position(i, shape.block, thread.position);
    thread.warp->threads[thread.lane] = &thread;
  }
}

// The blocks of clusters [begin, end) of `order`, together.
void run_clusters(const Shape& shape, const std::vector<uint64_t>& order, size_t begin,
                  size_t end) {
  Group& group = *machine.group;
  const size_t blocks = product(shape.cluster);
  group.cluster_blocks = static_cast<uint32_t>(blocks);
  group.blocks.resize((end - begin) * blocks);
  uint32_t clusters[3];
  for (int i = 0; i < 3; ++i) clusters[i] = shape.grid[i] / shape.cluster[i];
  for (size_t i = 0; i < group.blocks.size(); ++i) {
    if (!group.blocks[i]) group.blocks[i] = std::make_unique<Block>();
    Block& block = *group.blocks[i];
    prepare_block(block, shape, i);
    uint32_t cluster[3], within[3];
    position(order[begin + i / blocks], clusters, cluster);
    position(i % blocks, shape.cluster, within);
    for (int d = 0; d < 3; ++d) block.index[d] = cluster[d] * shape.cluster[d] + within[d];
    block.rank = static_cast<uint32_t>(i % blocks);
    block.first = static_cast<uint32_t>(i - i % blocks);
  }
  run_group();
  for (const auto& block : group.blocks) close_shared(*block);
}

void seed_schedule() {
  machine.random = (seed() + 1) * 0x9e3779b97f4a7c15u | 1;
  for (int i = 0; i < 4; ++i) random_bits();
  // Some seeds run a warp until it waits, some interleave warps finely; some land copies early.
  constexpr uint32_t kPreempt[] = {0, 1u << 25, 1u << 28, 1u << 30};
  constexpr uint32_t kEarly[] = {0, 0, 1u << 28};
  machine.preempt = kPreempt[random_bits() % 4];
  machine.early = kEarly[random_bits() % 3];
}

}  // namespace

void set_seed(uint64_t value) { chosen_seed = value; }

// For tests: kernels launched so far.
extern "C" __attribute__((visibility("default"))) uint64_t fk_launches() { return launches; }

void run(const void* kernel, const Shape& shape, void (*call)(const void*), const void* context) {
  static std::mutex one_at_a_time;
  static Group group;
  const std::lock_guard lock(one_at_a_time);
  check(kernel, shape);
  ++launches;
  seed_schedule();
  race::start_launch();
  machine.group = &group;
  machine.call = call;
  machine.context = context;
  blockDim = {shape.block[0], shape.block[1], shape.block[2]};
  gridDim = {shape.grid[0], shape.grid[1], shape.grid[2]};
  std::vector<uint64_t> order(product(shape.grid) / product(shape.cluster));
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
  const size_t together = shape.cooperative ? order.size() : 1;
  for (size_t i = 0; i < order.size(); i += together) {
    run_clusters(shape, order, i, std::min(order.size(), i + together));
  }
}

}  // namespace flashkern::emulator
