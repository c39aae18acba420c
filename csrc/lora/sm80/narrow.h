// The sum behind the shrink and behind the gradients of A and B: a wide operand of 16-bit or
// float32 rows, read once from memory, times a thin float32 one of up to 64 columns.
//
//   shrink      out[i, j] = sum over columns k of   left[i, k] right[j, k]     left: x, dy
//   gradient    out[i, j] = sum over rows k of      left[k, i] right[j, k]     left: x, dy
//
// Tile and warps: 64 of i by kRanks of j; four warps of 16 x 16 or 16 x 32 (kRanks 16, 32) or eight
// of 16 x 32 (64); a step is 128 bytes deep (64 16-bit elements, 32 floats).
//
//   left tile            shrink: 64 rows x 128 bytes          gradient: 64 (32) rows x 64 columns
//   right planes         3 x kRanks x depth bfloat16, or 1 of 16-bit numbers as they are: made from
//                        registers, one step ahead, two neighbours along the depth at a time
//
// Shared memory: 3 stages x 8 KiB + 3 planes x 2 KiB (kRanks 16), 4 (32) or 8 (64): 30 to 48 KiB.
// Pipeline: copy step s + 2 | cut right, drop left of step s | load right of s + 1, multiply s.
//
// Numerics: a float32 thin operand and what it meets are cut into bfloat16 pieces (1 for bfloat16,
// 2 for float16, 3 for float32), exactly, and all products of pieces that reach 2^-24 of the result
// are summed: float32's own error. Two 16-bit operands are multiplied uncut. Tensor cores add with
// truncation, so a step's sum starts at zero and joins the whole by a rounded addition. Henry,
// Tang, Heinecke: Leveraging the bfloat16 Artificial Intelligence Datatype for Higher-Precision
// Computations (arXiv 1904.06376).
#pragma once

#include "lora/sm80/common.h"
#include "lora/sm80/plan.h"

namespace flashkern::sm80 {

inline constexpr int kNarrowStages = 3;

template <class T>
inline constexpr int kLeftPieces = 3;
template <>
inline constexpr int kLeftPieces<BFloat16> = 1;
template <>
inline constexpr int kLeftPieces<Half> = 2;

// Blocks on a multiprocessor that the registers must allow: what hides the memory's latency.
template <int kRanks>
inline constexpr int kResident = kRanks <= 32 ? 3 : 2;

// Rows [row, row_end) by columns [column, column_end) of the wide operand; rows are positions.
struct NarrowTask {
  const void* left;
  int64_t left_row;
  bool aligned;  // rows start at multiples of 16 bytes
  RowOrder order;
  Keep keep;
  int64_t row, row_end, column, column_end;
  Factor right;
  bool paired;           // two neighbours along the depth may be loaded as one
  int rank_begin, rank;  // this block's columns of the thin operand start at rank_begin
  int adapter;
};

// kWide: the thin operand is float32; else it is T, like the other.
template <class T, int kRanks, bool kGradient, bool kWide>
struct NarrowSum {
  static constexpr int kDepth = 128 / sizeof(T);
  static constexpr int kRows = kGradient ? kDepth : kNarrowTile;
  static constexpr int kColumns = kGradient ? kNarrowTile : kDepth;
  static constexpr int kThreads = kRanks > 32 ? 256 : 128;
  static constexpr int kStrips = kRanks * 16 / kThreads;         // of 8 columns, a warp's
  static constexpr int kAhead = kRanks * kDepth / 2 / kThreads;  // pairs
  static constexpr int kPieces = kWide ? kLeftPieces<T> : 1, kRightPieces = kWide ? 3 : 1;
  static constexpr int kUnroll = kRanks > 16 ? 1 : kDepth / 16;  // more would spill

  using Factored = std::conditional_t<kWide, BFloat16, T>;  // what the tensor cores multiply
  using Right = std::conditional_t<kWide, float, T>;
  using Pair = std::conditional_t<kWide, float2, uint32_t>;

  struct Storage {
    alignas(1024) T left[kNarrowStages][kNarrowTile * kDepth];
    alignas(1024) Factored right[kRightPieces][kRanks * kDepth];
  };

  Storage& shared;
  const NarrowTask& task;
  Pair ahead[kAhead];

  FK_DEVICE NarrowSum(Storage& s, const NarrowTask& t) : shared(s), task(t) {}

  // Where this warp's 16 x 8 kStrips of the block's result begin.
  FK_DEVICE static int first_left() { return threadIdx.x / 32 % 4 * 16; }
  FK_DEVICE static int first_rank() { return threadIdx.x / 128 * 8 * kStrips; }

  FK_DEVICE int steps() const {
    const int64_t depth = kGradient ? task.row_end - task.row : task.column_end - task.column;
    return static_cast<int>((depth + kDepth - 1) / kDepth);
  }
  FK_DEVICE int64_t first_row(int step) const { return task.row + (kGradient ? step * kDepth : 0); }
  FK_DEVICE int64_t first_column(int step) const {
    return task.column + (kGradient ? 0 : step * kDepth);
  }

  // ---- the wide operand ----

  FK_DEVICE void copy(int step) {
    constexpr int kChunks = kColumns / kChunk<T>;
    const auto* left = static_cast<const T*>(task.left);
    T* tile = shared.left[step % kNarrowStages];
    for (int i = threadIdx.x; step < steps() && i < kRows * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const int64_t position = first_row(step) + row;
      const int64_t column = first_column(step) + chunk * kChunk<T>;
      const bool inside = position < task.row_end;
      const int count = inside ? clamp_count(task.column_end - column, kChunk<T>) : 0;
      const int64_t offset = count > 0 ? task.order.row(position) * task.left_row + column : 0;
      copy_chunk(tile + tile_offset<T, kColumns>(row, chunk), left + offset, count, task.aligned);
    }
    ptx::copy_commit();
  }

  // Zeros where dropout drops.
  FK_DEVICE void drop(int step) {
    T* tile = shared.left[step % kNarrowStages];
    constexpr int kQuads = kColumns / 4;
    for (int i = threadIdx.x; i < kRows * kQuads; i += kThreads) {
      const int row = i / kQuads, column = i % kQuads * 4;
      const int64_t position = first_row(step) + row;
      if (position >= task.row_end) break;
      const Philox4 random =
          task.keep.words(task.order.row(position), (first_column(step) + column) / 4);
      T* quad = tile + tile_offset<T, kColumns>(row, column / kChunk<T>) + column % kChunk<T>;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (random.word[e] <= task.keep.below) quad[e] = T{};
      }
    }
  }

  // The warp's 16 rows, 16 deep from k on, in pieces.
  FK_DEVICE void load_left(const T* tile, int k, uint32_t (&left)[kPieces][4]) const {
    const int lane = threadIdx.x % 32, first = first_left();
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first + lane / 4 + i % 2 * 8, depth = k + lane % 4 * 2 + i / 2 * 8;
        const float2 pair = {float_at(tile, row, depth), float_at(tile, row, depth + 1)};
        spread(pair, left, i);
      }
    } else {
      uint32_t raw[4];
      if constexpr (kGradient) {
        const int row = k + lane / 16 * 8 + lane % 8, chunk = first / 8 + lane / 8 % 2;
        ptx::ldmatrix_trans(raw, tile + tile_offset<T, kColumns>(row, chunk));
      } else {
        const int row = first + lane % 16, chunk = k / 8 + lane / 16;
        ptx::ldmatrix(raw, tile + tile_offset<T, kColumns>(row, chunk));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kPieces == 1) {
          left[0][i] = raw[i];
        } else {
          spread(ptx::unpack<T>(raw[i]), left, i);
        }
      }
    }
  }

  FK_DEVICE static float float_at(const T* tile, int row, int depth) {
    const int r = kGradient ? depth : row, c = kGradient ? row : depth;
    return ptx::to_float(tile[tile_offset<T, kColumns>(r, c / kChunk<T>) + c % kChunk<T>]);
  }

  FK_DEVICE static void spread(float2 pair, uint32_t (&left)[kPieces][4], int i) {
    uint32_t pieces[kPieces];
    cut_pair(pair, pieces);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) left[p][i] = pieces[p];
  }

  // ---- the thin operand ----

  // This thread's i-th pair of a right tile: consecutive threads read consecutive numbers.
  FK_DEVICE void place(int i, int& j, int& k) const {
    const int index = i * kThreads + threadIdx.x;
    const bool along = task.right.k_step == 1;
    j = along ? index / (kDepth / 2) : index % kRanks;
    k = 2 * (along ? index % (kDepth / 2) : index / kRanks);
  }

  // The second of a pair may lie beyond the end.
  FK_DEVICE Pair load_pair(int64_t first, int64_t second, bool both) const {
    const auto* data = static_cast<const Right*>(task.right.data);
    if (task.paired) return *reinterpret_cast<const Pair*>(data + first);
    const Right other = both ? data[second] : Right{};
    if constexpr (kWide) {
      return {data[first], other};
    } else {
      return data[first].bits | static_cast<uint32_t>(other.bits) << 16;
    }
  }

  FK_DEVICE void load_ahead(int step) {
    const int64_t begin = (kGradient ? task.row : task.column) + int64_t{step} * kDepth;
    const int64_t end = kGradient ? task.row_end : task.column_end;
    const Factor& right = task.right;
    int j, k;
    place(0, j, k);
    const bool along = right.k_step == 1;
    const int j_ahead = along ? 2 * kThreads / kDepth : 0;  // from one pair to the next
    const int k_ahead = along ? 0 : 2 * kThreads / kRanks;
    int64_t offset = right.offset(task.adapter, task.rank_begin + j, begin + k);
    const int64_t offset_ahead = j_ahead * right.i_step + k_ahead * right.k_step;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int rank = task.rank_begin + j + i * j_ahead;
      const int64_t at = begin + k + i * k_ahead;
      ahead[i] = {};
      if (rank < task.rank && at < end) {
        const bool both = at + 1 < end;
        if (kGradient && task.order.order != nullptr) {
          const int64_t second = both ? task.order.row(at + 1) : 0;
          ahead[i] = load_pair(right.offset(task.adapter, rank, task.order.row(at)),
                               right.offset(task.adapter, rank, second), both);
        } else {
          ahead[i] = load_pair(offset, offset + right.k_step, both);
        }
      }
      offset += offset_ahead;
    }
  }

  FK_DEVICE void store_right() {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      int j, k;
      place(i, j, k);
      uint32_t pieces[kRightPieces];
      if constexpr (kWide) {
        cut_pair(ahead[i], pieces);
      } else {
        pieces[0] = ahead[i];
      }
      const int offset = tile_offset<Factored, kDepth>(j, k / 8) + k % 8;
#pragma unroll
      for (int p = 0; p < kRightPieces; ++p) {
        *reinterpret_cast<uint32_t*>(shared.right[p] + offset) = pieces[p];
      }
    }
  }

  FK_DEVICE void load_right(int piece, int k, uint32_t (&right)[kStrips][2]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kStrips; j += 2) {
      const int row = first_rank() + 8 * j + lane / 16 * 8 + lane % 8;
      const int chunk = k / 8 + lane / 8 % 2;
      uint32_t four[4];
      ptx::ldmatrix(four, shared.right[piece] + tile_offset<Factored, kDepth>(row, chunk));
      right[j][0] = four[0], right[j][1] = four[1];
      right[j + 1][0] = four[2], right[j + 1][1] = four[3];
    }
  }

  // ---- the sum ----

  FK_DEVICE void multiply(int step, float (&sums)[kStrips][4]) const {
    const T* tile = shared.left[step % kNarrowStages];
    float part[kStrips][4] = {};
#pragma unroll kUnroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t left[kPieces][4], right[kStrips][2];
      load_left(tile, k, left);
#pragma unroll
      for (int r = 0; r < kRightPieces; ++r) {
        load_right(r, k, right);
#pragma unroll
        for (int l = 0; l < kPieces && l + r < kRightPieces; ++l) {
          ptx::mma_strip<Factored>(part, left[l], right);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kStrips; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[j][e] += part[j][e];
    }
  }

  // sums[j][e]: row first_left() + g + 8 (e / 2), column first_rank() + 8 j + 2 t + e % 2.
  FK_DEVICE void run(float (&sums)[kStrips][4]) {
    const int count = steps();
    __syncthreads();  // whoever used this memory before has finished
    for (int s = 0; s < kNarrowStages - 1; ++s) copy(s);
    load_ahead(0);
    for (int s = 0; s < count; ++s) {
      ptx::copy_wait<kNarrowStages - 2>();
      __syncthreads();  // step s has landed, everybody has multiplied step s - 1
      copy(s + kNarrowStages - 1);
      if (!task.keep.all) drop(s);
      store_right();
      __syncthreads();
      if (s + 1 < count) load_ahead(s + 1);
      multiply(s, sums);
    }
  }
};

}  // namespace flashkern::sm80
