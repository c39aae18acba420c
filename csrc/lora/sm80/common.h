// What the LoRA kernels share: operands, rows in the order of adapters, tiles of shared memory,
// and float32 as a sum of bfloat16 pieces.
#pragma once

#include "dropout.h"
#include "lora/params.h"
#include "ptx/convert.h"
#include "ptx/copy.h"
#include "ptx/core.h"
#include "ptx/matrix.h"
#include "ptx/mma.h"

namespace flashkern::sm80 {

// A row's adapter; -1 where its id names none.
FK_DEVICE int adapter_of(const int64_t* ids, int64_t row, int count) {
  const int64_t id = ids[row];
  return id >= 0 && id < count ? static_cast<int>(id) : -1;
}

// Rows sorted by adapter, rows without one first: adapter n has positions starts[n] to
// starts[n + 1]. Null pointers: every row has adapter 0 and lies at its own position.
struct RowOrder {
  const int* order = nullptr;
  const int* starts = nullptr;
  const int64_t* ids = nullptr;
  int count = 1;  // adapters

  FK_DEVICE int64_t row(int64_t position) const {
    return order != nullptr ? order[position] : position;
  }
  FK_DEVICE int adapter(int64_t position) const {
    return ids != nullptr ? adapter_of(ids, order[position], count) : 0;
  }
  FK_DEVICE bool empty(int adapter) const {
    return ids != nullptr && starts[adapter] == starts[adapter + 1];
  }
};

// A thin matrix, float32 or the kernel's own dtype: element (i, k) of adapter n, k being what is
// summed over. One of the steps is 1.
struct Factor {
  const void* data;
  bool wide;  // float32
  int64_t i_step, k_step, adapter_step;

  FK_DEVICE int64_t offset(int adapter, int64_t i, int64_t k) const {
    return adapter * adapter_step + i * i_step + k * k_step;
  }
  template <class T>
  FK_DEVICE float load(int64_t offset) const {
    if (wide) return static_cast<const float*>(data)[offset];
    return ptx::to_float(static_cast<const T*>(data)[offset]);
  }
  template <class T>
  FK_DEVICE float at(int adapter, int64_t i, int64_t k) const {
    return load<T>(offset(adapter, i, k));
  }
  // Two neighbours, where they lie together.
  template <class T>
  FK_DEVICE float2 load_pair(int64_t offset) const {
    if (wide) return *reinterpret_cast<const float2*>(static_cast<const float*>(data) + offset);
    return ptx::unpack<T>(*reinterpret_cast<const uint32_t*>(static_cast<const T*>(data) + offset));
  }
};

// Whether all pairs (k, k + 1) of a factor with even k lie together, k running to an even `depth`.
inline bool pairs_lie_together(const Factor& f, int64_t depth, int64_t element_bytes) {
  return f.k_step == 1 && depth % 2 == 0 &&
         reinterpret_cast<uintptr_t>(f.data) % (2 * element_bytes) == 0;
}

struct Keep {
  const uint64_t* seed = nullptr;
  bool all = true;     // no dropout
  uint32_t below = 0;  // a word up to here drops its element

  Keep() = default;
  explicit Keep(const LoraDropout& d)
      : seed(d.seed), all(d.threshold == 0), below(static_cast<uint32_t>(d.threshold - 1)) {}

  // The words of columns [4 quad, 4 quad + 4) of a row.
  FK_DEVICE Philox4 words(int64_t row, int64_t quad) const {
    return philox(*seed, static_cast<uint32_t>(quad), static_cast<uint32_t>(row), 0, 0);
  }
};

// ---- tiles: rows of 16-byte chunks, swizzled so that 8 rows at one chunk meet 8 groups of banks

template <class T>
inline constexpr int kChunk = 16 / sizeof(T);  // elements

// Where a chunk lies, in elements. Rows of 64 bytes turn in pairs.
template <class T, int kColumns>
FK_DEVICE int tile_offset(int row, int chunk) {
  constexpr int kChunks = kColumns / kChunk<T>;
  static_assert(kChunks == 4 || kChunks % 8 == 0);
  const int turn = kChunks == 4 ? row >> 1 & 3 : row & 7;
  return row * kColumns + (chunk ^ turn) * kChunk<T>;
}

// `count` elements and zeros up to a chunk. Not aligned: element by element, without cp.async.
template <class T>
FK_DEVICE void copy_chunk(T* to, const T* from, int count, bool aligned) {
  if (aligned) {
    ptx::copy_async<16>(to, from, count * static_cast<int>(sizeof(T)));
    return;
  }
#pragma unroll
  for (int e = 0; e < kChunk<T>; ++e) to[e] = e < count ? from[e] : T{};
}

FK_DEVICE int clamp_count(int64_t left, int most) {
  return static_cast<int>(left < 0 ? 0 : left < most ? left : most);
}

// ---- float32 as bfloat16 pieces ----

// What rounding x to `lead` left, exactly; 0 for infinities.
FK_DEVICE float rest(float x, float lead) { return x == lead ? 0.0f : x - lead; }

// Cuts a pair into kPieces pairs of bfloat16, each the nearest to what the ones before left. Three
// hold float32, two hold float16, one holds bfloat16, exactly. Nearest, not truncated: a piece is
// at most 2^-9 of the one before, of either sign, so that the products left out vanish.
template <int kPieces>
FK_DEVICE void cut_pair(float2 v, uint32_t (&pieces)[kPieces]) {
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    pieces[i] = ptx::pack<BFloat16>(v.x, v.y);
    const float2 lead = ptx::unpack<BFloat16>(pieces[i]);
    v = {rest(v.x, lead.x), rest(v.y, lead.y)};
  }
}

}  // namespace flashkern::sm80
