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

// Columns of the rank that a block of the narrow kernels takes.
constexpr int narrow_ranks(int64_t rank) { return rank <= 16 ? 16 : rank <= 32 ? 32 : 64; }

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A sum over `depth` in parts of `step` each, which are added in order afterwards. A step is even.
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

// Pieces of the rows, of one tile and one adapter each: cut wherever a tile begins or, where there
// are several adapters, the rows of one of them.
inline int64_t shrink_segments(int64_t rows, int64_t several) {
  return divide_up(rows, kNarrowTile) + several;
}

// Blocks for each part of the depth. They take a ticket where there are several parts.
inline int64_t shrink_blocks(int64_t rows, const LoraAdapters& ad) {
  const int64_t ranks = divide_up(ad.rank, narrow_ranks(ad.rank));
  return shrink_segments(rows, ad.ids == nullptr ? 0 : ad.count) * ranks;
}

inline int64_t shrink_bytes(int64_t rows, int64_t depth, const LoraAdapters& ad) {
  const int64_t parts = shrink_parts(rows, depth).count;
  if (parts == 1) return 0;
  return padded_bytes(4 * parts * rows * ad.rank) + padded_bytes(4 * shrink_blocks(rows, ad));
}

inline int64_t gradient_bytes(int64_t rows, int64_t width, const LoraAdapters& ad) {
  const int64_t parts = gradient_parts(rows, width, ad.count).count;
  const bool direct = parts == 1 && ad.dtype == DType::kFloat32;
  return direct ? 0 : padded_bytes(4 * parts * ad.count * width * ad.rank);
}

inline int64_t forward_workspace(const LoraForward& p) {
  return order_bytes(p.rows, p.adapters) + shrink_bytes(p.rows, p.in, p.adapters);
}

inline int64_t backward_workspace(const LoraBackward& p) {
  const LoraAdapters& ad = p.adapters;
  const int64_t dh = padded_bytes(4 * p.rows * ad.rank);
  const int64_t parts = std::max({shrink_bytes(p.rows, p.out, ad), gradient_bytes(p.rows, p.in, ad),
                                  gradient_bytes(p.rows, p.out, ad)});
  return order_bytes(p.rows, ad) + dh + parts;
}

// ---- the base product ----

inline constexpr int kProductTile = 128, kFloatTile = 64;  // rows and columns of a block of y
inline constexpr int kDecodeRows = 64, kDecodeColumns = 32;

// Who computes the base product, rows x depth, on a GPU. 16-bit dtypes run on tensor cores here,
// with the adapter in the same sum: kFew (decode.cu) up to 64 rows, kTiles (product.cu) above. A
// float32 product here runs on plain FMAs, where cuBLAS is the better one.
//
// 9.x to 11.x multiply at full rate by wgmma and tcgen05 alone. product.cu's mma can reach about
// 0.6 of an H100's 989 TFLOP/s, so an element of y costs it 2 depth / 989e12 x (1 / 0.6 - 1) =
// depth x 1.35 fs more than cuBLAS.
// cuBLAS in turn needs the adapter's part in memory first. Either order of the two, BLAS first or
// last, writes y twice and reads it once; here BLAS comes last:
//   - its epilogue reads y beneath the next tiles' products, so the first write alone is exposed:
//     2 bytes / 3.35 TB/s = 0.6 ps for an element, and 0.6 ps more where L2 cannot hide the read;
//   - y's first rounding is one of the adapter's part, smaller than y, not one of y itself.
// 1.2 ps / 1.35 fs = 890: BLAS from a depth of 1024 on. This compares the products alone: the
// shrink reads x before either, and BLAS is one launch more.
inline constexpr int64_t kBlasDepth = 1024;

inline LoraBase lora_base(int64_t rows, int64_t depth, DType dtype, bool forward, LoraChoice choice,
                          int capability) {
  const bool own = choice == LoraChoice::kOwn;
  if (choice == LoraChoice::kBlas) return LoraBase::kBlas;
  if (dtype == DType::kFloat32) return own ? LoraBase::kTiles : LoraBase::kBlas;
  if (forward && rows <= kDecodeRows) return LoraBase::kFew;
  const bool wide = capability >= 90 && capability < 120;
  return wide && !own && depth >= kBlasDepth ? LoraBase::kBlas : LoraBase::kTiles;
}

inline bool starts_a_chunk(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

// What decode.cu takes beyond its rows; other calls run as tiles.
inline bool decode_fits(const LoraForward& p) {
  return p.base == LoraBase::kFew && p.rows <= kDecodeRows && p.dtype != DType::kFloat32 &&
         p.in % 8 == 0 && p.x_row % 8 == 0 && starts_a_chunk(p.x) && starts_a_chunk(p.weight);
}

// And where it computes h too; else the shrink has gone before. Every block reads all of A, from
// L2: up to here no more bytes than its own rows of W, which lie in memory.
inline bool decode_shrinks(const LoraForward& p) {
  const LoraAdapters& ad = p.adapters;
  const int64_t most = ad.dtype == p.dtype ? kDecodeColumns : kDecodeColumns / 2;
  return ad.ids == nullptr && ad.rank <= most && p.dropout.threshold == 0 && starts_a_chunk(ad.a);
}

// ---- the forward pass as a whole ----

struct ForwardPlan {
  LoraBase base;                            // who computes the base product in the end
  int64_t tile_rows, tile_columns, blocks;  // of the kernel that writes y
  int64_t shrink_blocks, shrink_parts;      // 0: that kernel computes h itself
  int launches;                             // our own: BLAS's, where it is the base, come on top
};

inline ForwardPlan plan_forward(const LoraForward& p) {
  const bool few = decode_fits(p), shrinks = few && decode_shrinks(p);
  ForwardPlan plan{p.base, kProductTile, kProductTile, 0, 0, 0, 1};
  if (few) {
    plan.tile_rows = kDecodeRows;
    plan.tile_columns = kDecodeColumns;
  } else {
    if (p.base == LoraBase::kFew) plan.base = LoraBase::kTiles;
    if (p.dtype == DType::kFloat32) plan.tile_rows = plan.tile_columns = kFloatTile;
  }
  plan.blocks = divide_up(p.rows, plan.tile_rows) * divide_up(p.out, plan.tile_columns);
  if (!shrinks && p.adapters.rank > 0) {
    plan.shrink_parts = shrink_parts(p.rows, p.in).count;
    plan.shrink_blocks = plan.shrink_parts * shrink_blocks(p.rows, p.adapters);
    ++plan.launches;
  }
  if (p.adapters.ids != nullptr) ++plan.launches;
  return plan;
}

}  // namespace flashkern::sm80
