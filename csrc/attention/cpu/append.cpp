// Copies new keys and values into a cache: row t of batch b goes to token cache_lengths[b] + t of
// its sequence, wherever the pages put that. Bytes are moved, so one kernel serves every dtype.
#include <cstring>

#include "attention/cpu/forward.h"

namespace flashkern::FK_ISA {
namespace {

using flashkern::attention::AppendParams;
using flashkern::attention::Matrix;
using flashkern::attention::Output;

void copy_row(const AppendParams& p, const Matrix& from, const Output& to, int64_t bytes, int64_t b,
              int64_t head, int64_t t) {
  const int64_t token = p.cache_lengths[b] + t;
  int64_t at = b * to.batch + token * to.row;
  if (p.page_table != nullptr) {
    const int64_t page = p.page_table[b * p.page_table_row + token / p.page_size];
    at = page * to.batch + token % p.page_size * to.row;
  }
  const int64_t source = b * from.batch + head * from.head + t * from.row;
  std::memcpy(static_cast<char*>(to.data) + (at + head * to.head) * p.element_bytes,
              static_cast<const char*>(from.data) + source * p.element_bytes, bytes);
}

}  // namespace

void attention_append(const AppendParams& p, const Threads& threads) {
  threads.run(p.batch * p.kv_heads, [&](int64_t task, int) {
    const int64_t b = task / p.kv_heads, head = task % p.kv_heads;
    for (int64_t t = 0; t < p.rows; ++t) {
      copy_row(p, p.new_key, p.key_cache, p.key_bytes, b, head, t);
      copy_row(p, p.new_value, p.value_cache, p.value_bytes, b, head, t);
    }
  });
}

}  // namespace flashkern::FK_ISA
