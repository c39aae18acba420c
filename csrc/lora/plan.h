// How a LoRA call is cut into pieces. Rows are sorted by adapter and cut into segments: a segment
// is one task, it has one adapter, and its part of dA and dB is summed in one buffer. Segments are
// walked in blocks of rows that stay in L2. Nothing here depends on the number of threads, so sums
// have one order and results the same bits on any number of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "simd/isa.h"
#include "types.h"

namespace flashkern {

inline constexpr int64_t kLoraBlockRows = 96;  // a multiple of the micro-GEMM's 6 rows
inline constexpr int64_t kLoraBlockCols = 256;
inline constexpr int64_t kLoraMaxSegments = 32;  // for each adapter: bounds the partial sums

struct LoraSegment {
  int64_t adapter;
  int64_t begin, end;  // positions in the order of rows
};

struct LoraPlan {
  std::vector<int64_t> order;  // rows sorted by adapter; empty: as they come
  std::vector<LoraSegment> segments;
  std::vector<int64_t> first;  // segments of adapter i: [first[i], first[i + 1])
  int64_t block_rows = 0;      // the most rows that a block has
};

inline void lora_cut(LoraPlan& plan, int64_t adapter, int64_t begin, int64_t end) {
  const int64_t rows = end - begin;
  const int64_t blocks = (rows + kLoraBlockRows - 1) / kLoraBlockRows;
  const int64_t step = (blocks + kLoraMaxSegments - 1) / kLoraMaxSegments * kLoraBlockRows;
  plan.first.push_back(static_cast<int64_t>(plan.segments.size()));
  for (int64_t i = begin; i < end; i += step) {
    plan.segments.push_back({adapter, i, std::min(end, i + step)});
  }
  plan.block_rows = std::max(plan.block_rows, std::min(rows, kLoraBlockRows));
}

// Rows without an adapter (-1) are in no segment.
inline LoraPlan lora_plan(int64_t rows, int64_t adapters, const int64_t* ids) {
  LoraPlan plan;
  plan.first.reserve(adapters + 1);
  if (ids == nullptr) {
    lora_cut(plan, 0, 0, rows);
  } else {
    std::vector<int64_t> next(adapters + 1, 0);
    for (int64_t i = 0; i < rows; ++i) {
      if (ids[i] >= 0) ++next[ids[i] + 1];
    }
    for (int64_t n = 0; n < adapters; ++n) next[n + 1] += next[n];
    plan.order.resize(next[adapters]);
    for (int64_t n = 0; n < adapters; ++n) lora_cut(plan, n, next[n], next[n + 1]);
    for (int64_t i = 0; i < rows; ++i) {
      if (ids[i] >= 0) plan.order[next[ids[i]]++] = i;
    }
  }
  // No rows, no memory for ids: their pointer is null then, and the other adapters have no segment.
  plan.first.resize(adapters + 1, static_cast<int64_t>(plan.segments.size()));
  return plan;
}

// ---- the base product ----

// Who computes x W^T and dy W: torch's BLAS, or this library's own tiles with the adapter's product
// in the same sum, or, for a few rows, dot products that read W once.
enum class LoraBase { kBlas, kTiles, kFew };

inline constexpr int64_t kFewRows = 16;  // up to here W is better read in place than packed
inline constexpr int64_t kFewRowsBesideBlas = 8;  // and up to here, beside a good 16-bit BLAS
inline constexpr int64_t kFewTaskCols = 48;       // whole blocks of 6 and of 8
inline constexpr int64_t kProductDepth = 256;     // a panel of 256 x 32 floats fills half of an L1
inline constexpr int64_t kProductCols = 256;      // at most, of one task
inline constexpr int64_t kProductTileRows = 84;   // whole blocks of the micro-GEMM's 14 and 6 rows
inline constexpr int64_t kProductTaskRows = 672;  // 16-bit results: 336 KiB of sums

// What the caller wants: kAuto is the choice below; the others are for tests and measurements.
enum class LoraChoice { kAuto, kBlas, kOwn };

// MKL, which torch carries, keeps its AVX-512 kernels for Intel's CPUs; oneDNN's 16-bit products
// are good where the CPU multiplies 16-bit numbers itself. float64 is unhurried: BLAS's.
inline LoraBase lora_base(int64_t rows, DType dtype, bool forward, LoraChoice choice,
                          const CpuFacts& cpu) {
  const bool good_blas = dtype == DType::kFloat32    ? cpu.intel
                         : dtype == DType::kBFloat16 ? cpu.bfloat16
                         : dtype == DType::kFloat16  ? cpu.half
                                                     : true;
  const bool own = choice == LoraChoice::kOwn;
  if (dtype == DType::kFloat64 || choice == LoraChoice::kBlas) return LoraBase::kBlas;
  const bool beside = good_blas && dtype != DType::kFloat32 && !own;
  const bool few = rows <= (beside ? kFewRowsBesideBlas : kFewRows);
  if (few && forward) return LoraBase::kFew;
  return own || (!few && !good_blas) ? LoraBase::kTiles : LoraBase::kBlas;
}

struct ProductCut {
  int64_t task_rows = 1, task_columns = 1, row_blocks = 0, strips = 0;
  int64_t tasks() const { return row_blocks * strips; }
};

// The cut whose slowest thread has least to do. A task's cost is its area, plus the packing of its
// weights, worth 40 rows, and the copying of its rows, worth 12 columns (measured). No sum depends
// on the cut.
inline ProductCut product_cut(int64_t rows, int64_t columns, int64_t threads) {
  constexpr int64_t kRowUnit = 14, kPacking = 40, kCopying = 12;
  ProductCut best;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t width = kProductCols; rows > 0 && columns > 0 && width >= 64; width /= 2) {
    const int64_t strips = (columns + width - 1) / width;
    for (int64_t blocks = (rows + kProductTaskRows - 1) / kProductTaskRows;; ++blocks) {
      const int64_t step = ((rows + blocks - 1) / blocks + kRowUnit - 1) / kRowUnit * kRowUnit;
      const ProductCut cut{step, width, (rows + step - 1) / step, strips};
      const int64_t rounds = (cut.tasks() + threads - 1) / threads;
      const int64_t cost = rounds * (step + kPacking) * (width + kCopying);
      if (cost < least) {
        least = cost;
        best = cut;
      }
      if (step <= kProductTileRows || cut.tasks() >= 8 * threads) break;
    }
  }
  return best;
}

}  // namespace flashkern
