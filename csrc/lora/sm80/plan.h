// How a LoRA call is cut into blocks on a GPU, and how much workspace it needs. The cuts follow
// from the shape alone, so that a call has the same bits on any GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lora/params.h"

namespace flashkern::sm80 {

inline constexpr int kNarrowTile = 64;         // rows of h, or columns of dA and dB, of one block
inline constexpr int64_t kNarrowBlocks = 264;  // two for each multiprocessor of an H100
inline constexpr int64_t kMaxParts = 16;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A sum over `depth` in parts of `step` each, which are added in order afterwards.
struct Parts {
  int64_t count, step;
};

// As many parts as fill the machine, none shorter than 256.
inline Parts cut_depth(int64_t depth, int64_t blocks) {
  constexpr int64_t kShortest = 256;
  const int64_t wanted = std::max<int64_t>(1, kNarrowBlocks / std::max<int64_t>(blocks, 1));
  const int64_t count = std::min({wanted, kMaxParts, divide_up(depth, kShortest)});
  if (count <= 1) return {1, depth};
  const int64_t step = divide_up(divide_up(depth, count), kNarrowTile) * kNarrowTile;
  return {divide_up(depth, step), step};
}

// h from x, dh from dy: rows x depth.
inline Parts shrink_parts(int64_t rows, int64_t depth) {
  return cut_depth(depth, divide_up(rows, kNarrowTile));
}

// dA and dB: sums over the rows of one adapter. With several, an adapter's rows are cut on the GPU.
inline Parts gradient_parts(int64_t rows, int64_t width, int64_t adapters) {
  return cut_depth(rows, divide_up(width, kNarrowTile) * adapters);
}

constexpr int64_t padded_bytes(int64_t bytes) { return divide_up(bytes, 256) * 256; }

// Rows sorted by adapter: a permutation and each adapter's start.
inline int64_t order_bytes(int64_t rows, const LoraAdapters& ad) {
  return ad.ids == nullptr ? 0 : padded_bytes(4 * rows) + padded_bytes(4 * (ad.count + 1));
}

inline int64_t shrink_bytes(int64_t rows, int64_t depth, int64_t rank) {
  const int64_t parts = shrink_parts(rows, depth).count;
  return parts > 1 ? padded_bytes(4 * parts * rows * rank) : 0;
}

inline int64_t gradient_bytes(int64_t rows, int64_t width, const LoraAdapters& ad) {
  const int64_t parts = gradient_parts(rows, width, ad.count).count;
  const bool direct = parts == 1 && ad.dtype == DType::kFloat32;
  return direct ? 0 : padded_bytes(4 * parts * ad.count * width * ad.rank);
}

inline int64_t forward_workspace(const LoraForward& p) {
  return order_bytes(p.rows, p.adapters) + shrink_bytes(p.rows, p.in, p.adapters.rank);
}

inline int64_t backward_workspace(const LoraBackward& p) {
  const LoraAdapters& ad = p.adapters;
  const int64_t dh = padded_bytes(4 * p.rows * ad.rank);
  const int64_t parts =
      std::max({shrink_bytes(p.rows, p.out, ad.rank), gradient_bytes(p.rows, p.in, ad),
                gradient_bytes(p.rows, p.out, ad)});
  return order_bytes(p.rows, ad) + dh + parts;
}

// ---- the base product ----

inline constexpr int64_t kDecodeRows = 64, kDecodeRank = 64;

// Who computes the base product on a GPU. 16-bit dtypes run on tensor cores here, with the adapter
// in the same sum: kFew (decode.cu) up to 64 rows, kTiles (product.cu) above. A float32 product
// here runs on plain FMAs, where cuBLAS is the better one.
inline LoraBase lora_base(int64_t rows, DType dtype, bool forward, LoraChoice choice) {
  if (choice == LoraChoice::kBlas) return LoraBase::kBlas;
  if (dtype == DType::kFloat32) {
    return choice == LoraChoice::kOwn ? LoraBase::kTiles : LoraBase::kBlas;
  }
  return forward && rows <= kDecodeRows ? LoraBase::kFew : LoraBase::kTiles;
}

// What decode.cu takes beyond its rows; other calls run as tiles.
inline bool decode_fits(const LoraForward& p) {
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  return p.base == LoraBase::kFew && p.rows <= kDecodeRows && p.dtype != DType::kFloat32 &&
         p.in % 8 == 0 && p.x_row % 8 == 0 && aligned(p.x) && aligned(p.weight);
}

// And where it computes h too; else the shrink has gone before.
inline bool decode_shrinks(const LoraForward& p) {
  return p.adapters.ids == nullptr && p.adapters.rank <= kDecodeRank && p.dropout.threshold == 0;
}

}  // namespace flashkern::sm80
