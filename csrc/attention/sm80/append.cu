// Appends new keys and values to a cache in place. One warp for each row of keys and its row of
// values, 16 bytes a lane where addresses allow. Nobody has read the lengths and the page table
// before: a row that does not fit the cache, or whose page does not exist (-1 where a batch is
// padded), is not written.
#include "attention/gpu.h"
#include "ptx/launch.h"

namespace flashkern::attention::sm80 {
namespace {

constexpr int kWarps = 4;

template <class Unit>
FK_DEVICE void copy_row(char* to, const char* from, int64_t bytes) {
  const int count = static_cast<int>(bytes / sizeof(Unit));
  for (int i = ptx::lane_id(); i < count; i += 32) {
    reinterpret_cast<Unit*>(to)[i] = reinterpret_cast<const Unit*>(from)[i];
  }
}

FK_DEVICE void append_row(const AppendParams& p, const Matrix& source, const Output& cache,
                          int64_t bytes, unsigned batch, unsigned head, unsigned t) {
  const int64_t token = int64_t{p.cache_lengths[batch]} + t;
  if (token < 0 || token >= p.capacity) return;
  int64_t at = batch;
  auto slot = static_cast<unsigned>(token);
  if (p.page_table != nullptr) {
    const auto page_size = static_cast<unsigned>(p.page_size);
    at = p.page_table[batch * p.page_table_row + slot / page_size];
    if (at < 0 || at >= p.pages) return;
    slot %= page_size;
  }
  const auto* from = static_cast<const char*>(source.data) +
                     p.element_bytes * (batch * source.batch + head * source.head + t * source.row);
  auto* to = static_cast<char*>(cache.data) +
             p.element_bytes * (at * cache.batch + head * cache.head + slot * cache.row);
  const auto bits = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) |
                    static_cast<uintptr_t>(bytes);
  if (bits % 16 == 0) {
    copy_row<uint4>(to, from, bytes);
  } else if (bits % 4 == 0) {
    copy_row<uint32_t>(to, from, bytes);
  } else {
    copy_row<uint16_t>(to, from, bytes);
  }
}

__global__ void __launch_bounds__(32 * kWarps) append(const AppendParams p) {
  const unsigned row = blockIdx.x * kWarps + ptx::warp_id();
  const auto rows = static_cast<unsigned>(p.rows), heads = static_cast<unsigned>(p.kv_heads);
  const unsigned t = row % rows, head = row / rows % heads, batch = row / rows / heads;
  if (batch >= p.batch) return;
  append_row(p, p.new_key, p.key_cache, p.key_bytes, batch, head, t);
  append_row(p, p.new_value, p.value_cache, p.value_bytes, batch, head, t);
}

}  // namespace
}  // namespace flashkern::attention::sm80

namespace flashkern::gpu {

void attention_append(const attention::AppendParams& p, GpuStream stream) {
  using namespace attention::sm80;
  const int64_t rows = p.batch * p.kv_heads * p.rows;
  if (rows == 0) return;
  const auto blocks = static_cast<unsigned>((rows + kWarps - 1) / kWarps);
  ptx::launch(append, {blocks, 32 * kWarps}, stream, p);
}

}  // namespace flashkern::gpu
