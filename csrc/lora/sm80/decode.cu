// y = x W^T + bias + h B^T for up to 64 rows, bfloat16 or float16, in one launch: a decoding step.
// W is read once, at the speed of memory; everything else rides along.
//
// A block owns 32 columns of y, 32 rows of W. Its eight warps share the depth, 32 at a time: warp w
// takes steps w, w + 8, ... and multiplies W's rows (two slabs of 16, the mma's rows) by all of x
// (up to eight strips of 8 rows, the mma's columns). The warps' sums meet in shared memory, in
// order.
//
// A step's numbers go from global memory straight to the mma's registers: the order of the terms of
// a sum is free, so lane (g, t) takes the 8 consecutive ones from 8 t on of row g, of W and of x
// alike, as its share of two mmas. 16-byte loads, whole 64-byte runs, no shared memory.
//
// h = scale * x A^T is computed by every block for itself, in the same loop: A's rows are more rows
// of W, one or two slabs of them, which come from L2 beneath W's (block 0 writes h). No block waits
// for another, and a decoding step is one launch. A of x's dtype is multiplied as it is; float32 A
// and x are cut into bfloat16 pieces as in narrow.h. h and its product with B are float32.
//
// Shared memory: 8 partial sums of 32 x 8 strips, h (where it is made here) and 32 x 32 of B: 15
// KiB for 8 rows, 78 KiB for 64. B's numbers are loaded along its rows, before the loop, to wait
// for nothing at the end.
//
// Only rows of whole, aligned 16-byte chunks. Several adapters, dropout, ranks above 32 (16 where A
// is float32): the shrink goes before, a launch of its own, and h is read. Of several adapters each
// row takes its own B, from memory.
//
// Chen et al.: Punica: Multi-Tenant LoRA Serving (arXiv 2310.18547) for shrink and expand as one
// step.
#include "lora/sm80/kernels.h"
#include "lora/sm80/narrow.h"
#include "ptx/launch.h"

namespace flashkern::sm80 {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kSlabs = 2, kDepth = 32;
constexpr int kColumns = kDecodeColumns, kRanks = 32;  // of B, at a time: a warp's lanes

// The types of x and of A; strips of 8 rows of x; slabs of 16 rows of A, none where h is read.
template <class Element, class Adapter, int kStripCount, int kLowSlabs>
struct Shape {
  using T = Element;
  using A = Adapter;
  static constexpr int kStrips = kStripCount, kRows = 8 * kStrips;
  static constexpr int kLow = kLowSlabs, kLowRoom = kLow > 0 ? kLow : 1;
  static constexpr bool kCut = !std::is_same_v<T, A>;  // A is float32
  static constexpr int kRuns = sizeof(A) / 2;          // of 16 bytes: eight elements of a row of A
  static constexpr int kTiles = kStrips * (kSlabs + kLow);  // a lane's sums, by fours
  static constexpr int kResident = kTiles > 12 ? 1 : 2;
  static constexpr int kUnroll = kTiles > 6 || (kCut && kStrips > 1) ? 1 : 2;  // more would spill

  struct Storage {
    float part[kWarps][kColumns][kRows + 1];
    float b[kColumns][kRanks + 1];
    float h[kRows][16 * kLow + 1];
  };
};

template <int kStrips, int kCount>
using Sums = float[kCount][kStrips][4];

// 16 bytes of a row.
struct Run {
  uint32_t word[4];
};

template <class T>
FK_DEVICE Run load_run(const T* row, bool exists) {
  if (!exists) return {};
  const uint4 v = *reinterpret_cast<const uint4*>(row);
  return {{v.x, v.y, v.z, v.w}};
}

// What a lane holds of a step: rows g and g + 8 of each slab, row g of each strip.
template <class S>
struct Step {
  Run w[kSlabs][2], a[S::kLowRoom][2][S::kRuns], x[S::kStrips];

  FK_DEVICE Step(const DecodeParams& p, int64_t first, int64_t k) {
    using T = typename S::T;
    using A = typename S::A;
    const int g = threadIdx.x % 32 / 4;
    const bool inside = k < p.in;
#pragma unroll
    for (int i = 0; i < 2 * kSlabs; ++i) {
      const int64_t row = first + 8 * i + g;
      const bool exists = inside && row < p.out;
      w[i / 2][i % 2] =
          load_run(static_cast<const T*>(p.weight) + (exists ? row * p.in + k : 0), exists);
    }
#pragma unroll
    for (int i = 0; i < 2 * S::kLow; ++i) {
      const int row = 8 * i + g;
      const bool exists = inside && row < p.rank;
      const A* from = static_cast<const A*>(p.a.data) + (exists ? row * p.in + k : 0);
#pragma unroll
      for (int c = 0; c < S::kRuns; ++c) a[i / 2][i % 2][c] = load_run(from + 4 * c, exists);
    }
#pragma unroll
    for (int j = 0; j < S::kStrips; ++j) {
      const int row = 8 * j + g;
      const bool exists = inside && row < p.rows;
      x[j] = load_run(static_cast<const T*>(p.x) + (exists ? row * p.x_row + k : 0), exists);
    }
  }
};

// sums += a slab's rows by x, four of a lane's eight terms.
template <class T, int kStrips>
FK_DEVICE void multiply(const Run& upper, const Run& lower, int half,
                        const uint32_t (&right)[kStrips][2], float (&sums)[kStrips][4]) {
  const uint32_t left[4] = {upper.word[2 * half], lower.word[2 * half], upper.word[2 * half + 1],
                            lower.word[2 * half + 1]};
  ptx::mma_strip<T>(sums, left, right);
}

// Four floats, as pairs, in pieces.
FK_DEVICE void cut_run(const Run& run, uint32_t (&pieces)[2][3]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    cut_pair({__uint_as_float(run.word[2 * i]), __uint_as_float(run.word[2 * i + 1])}, pieces[i]);
  }
}

// The same with rows of float32, all products of pieces that count.
template <class T, int kStrips>
FK_DEVICE void multiply_cut(const Run& upper, const Run& lower, const uint32_t (&x)[kStrips][2],
                            float (&sums)[kStrips][4]) {
  uint32_t up[2][3], low[2][3];
  cut_run(upper, up);
  cut_run(lower, low);
#pragma unroll
  for (int r = 0; r < kLeftPieces<T>; ++r) {
    uint32_t right[kStrips][2];
#pragma unroll
    for (int i = 0; i < 2 * kStrips; ++i) {
      uint32_t pieces[kLeftPieces<T>];
      cut_pair(ptx::unpack<T>(x[i / 2][i % 2]), pieces);
      right[i / 2][i % 2] = pieces[r];
    }
#pragma unroll
    for (int l = 0; l + r < 3; ++l) {
      const uint32_t left[4] = {up[0][l], low[0][l], up[1][l], low[1][l]};
      ptx::mma_strip<BFloat16>(sums, left, right);
    }
  }
}

// base += rows [first, first + 32) of W by x, low += rows of A by x: this warp's share of the
// depth.
template <class S>
FK_DEVICE void add_steps(const DecodeParams& p, int64_t first, Sums<S::kStrips, kSlabs>& base,
                         Sums<S::kStrips, S::kLowRoom>& low) {
  using T = typename S::T;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll S::kUnroll
  for (int64_t begin = warp * kDepth; begin < p.in; begin += kWarps * kDepth) {
    const Step<S> step(p, first, begin + lane % 4 * 8);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t x[S::kStrips][2];
#pragma unroll
      for (int j = 0; j < S::kStrips; ++j) {
        x[j][0] = step.x[j].word[2 * half], x[j][1] = step.x[j].word[2 * half + 1];
      }
#pragma unroll
      for (int i = 0; i < kSlabs; ++i) multiply<T>(step.w[i][0], step.w[i][1], half, x, base[i]);
#pragma unroll
      for (int i = 0; i < S::kLow; ++i) {
        if constexpr (S::kCut) {
          multiply_cut<T>(step.a[i][0][half], step.a[i][1][half], x, low[i]);
        } else {
          multiply<T>(step.a[i][0][0], step.a[i][1][0], half, x, low[i]);
        }
      }
    }
  }
}

// Hands the warps' sums to shared memory; then sum_of(column, row) may be asked.
template <class Storage, int kStrips, int kCount>
FK_DEVICE void meet(Storage& shared, const Sums<kStrips, kCount>& sums) {
  const int lane = threadIdx.x % 32;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int j = 0; j < kStrips; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = 16 * i + lane / 4 + e / 2 * 8, row = 8 * j + lane % 4 * 2 + e % 2;
        shared.part[threadIdx.x / 32][column][row] = sums[i][j][e];
      }
    }
  }
  __syncthreads();
}

template <class Storage>
FK_DEVICE float sum_of(const Storage& shared, int column, int row) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += shared.part[w][column][row];
  return sum;
}

// A's sums become h: here for this block, and once for the backward pass.
template <class Storage>
FK_DEVICE void make_h(Storage& shared, const DecodeParams& p) {
  const int rank = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < p.rows && rank < p.rank; row += kWarps) {
    const float value = p.scale * sum_of(shared, rank, row);
    shared.h[row][rank] = value;
    if (blockIdx.x == 0) p.h[row * p.rank + rank] = value;
  }
}

// The one adapter's B, 32 rows by 32 ranks from `rank` on: a lane's numbers lie side by side.
template <class S>
struct Expand {
  static constexpr int kShare = kColumns / kWarps;
  float ahead[kShare];

  FK_DEVICE void load(const DecodeParams& p, int64_t first, int rank) {
    const int r = rank + threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kShare; ++n) {
      const int64_t column = first + threadIdx.x / 32 + n * kWarps;
      const bool exists = r < p.rank && column < p.out;
      ahead[n] = exists ? p.b.at<typename S::T>(0, column, r) : 0.0f;
    }
  }
  FK_DEVICE void store(typename S::Storage& shared) const {
#pragma unroll
    for (int n = 0; n < kShare; ++n) {
      shared.b[threadIdx.x / 32 + n * kWarps][threadIdx.x % 32] = ahead[n];
    }
  }
};

// values[n] += h B^T for column `lane` and row warp + 8 n.
template <class S>
FK_DEVICE void expand(typename S::Storage& shared, const DecodeParams& p, int64_t first,
                      Expand<S>& b, float (&values)[S::kStrips]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int begin = 0; begin < p.rank; begin += kRanks) {
    if (begin > 0) b.load(p, first, begin);
    __syncthreads();
    b.store(shared);
    __syncthreads();
    const int ranks = min(kRanks, p.rank - begin);
#pragma unroll
    for (int n = 0; n < S::kStrips; ++n) {
      const int row = warp + n * kWarps;
      if (row >= p.rows) break;
      const float* h = S::kLow > 0 ? shared.h[row] : p.h + row * p.rank + begin;
      for (int r = 0; r < ranks; ++r) values[n] = __fmaf_rn(h[r], shared.b[lane][r], values[n]);
    }
  }
}

// The same where each row has an adapter of its own.
template <class S>
FK_DEVICE void expand_several(const DecodeParams& p, int64_t column, float (&values)[S::kStrips]) {
#pragma unroll
  for (int n = 0; n < S::kStrips; ++n) {
    const int row = threadIdx.x / 32 + n * kWarps;
    if (row >= p.rows) break;
    const int adapter = adapter_of(p.ids, row, p.count);
    for (int r = 0; adapter >= 0 && column < p.out && r < p.rank; ++r) {
      const float b = p.b.at<typename S::T>(adapter, column, r);
      values[n] = __fmaf_rn(p.h[row * p.rank + r], b, values[n]);
    }
  }
}

template <class T, class A, int kStrips, int kLow>
__global__ void __launch_bounds__(kThreads, Shape<T, A, kStrips, kLow>::kResident)
    decode_kernel(const DecodeParams p) {
  using S = Shape<T, A, kStrips, kLow>;
  auto& shared = ptx::shared_storage<typename S::Storage>();
  const int64_t first = int64_t{blockIdx.x} * kColumns, column = first + threadIdx.x % 32;
  Expand<S> b;
  if (p.ids == nullptr) b.load(p, first, 0);
  Sums<kStrips, kSlabs> base = {};
  Sums<kStrips, S::kLowRoom> low = {};
  add_steps<S>(p, first, base, low);
  if constexpr (kLow > 0) {
    meet(shared, low);
    make_h(shared, p);
  }
  meet(shared, base);
  float values[kStrips];
#pragma unroll
  for (int n = 0; n < kStrips; ++n) {
    values[n] = sum_of(shared, threadIdx.x % 32, threadIdx.x / 32 + n * kWarps);
  }
  if (p.ids == nullptr) {
    expand<S>(shared, p, first, b, values);
  } else {
    expand_several<S>(p, column, values);
  }
  if (column >= p.out) return;
  float bias = 0.0f;
  if (p.bias != nullptr) bias = ptx::to_float(static_cast<const T*>(p.bias)[column]);
#pragma unroll
  for (int n = 0; n < kStrips; ++n) {
    const int row = threadIdx.x / 32 + n * kWarps;
    if (row >= p.rows) break;
    if (p.bias != nullptr) values[n] += bias;
    static_cast<T*>(p.y)[row * p.out + column] = ptx::from_float<T>(values[n]);
  }
}

template <class T, class A, int kLow>
void run(const DecodeParams& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(divide_up(p.out, kColumns));
  const auto launch = [&](auto strips) {
    constexpr int kStrips = decltype(strips)::value;
    using Storage = typename Shape<T, A, kStrips, kLow>::Storage;
    ptx::launch(decode_kernel<T, A, kStrips, kLow>, {blocks, kThreads, sizeof(Storage)}, stream, p);
  };
  if (p.rows <= 8) {
    launch(std::integral_constant<int, 1>());
  } else if (p.rows <= 16) {
    launch(std::integral_constant<int, 2>());
  } else if (p.rows <= 32) {
    launch(std::integral_constant<int, 4>());
  } else {
    launch(std::integral_constant<int, 8>());
  }
}

template <class T>
void run(const DecodeParams& p, cudaStream_t stream) {
  if (!p.shrinks || p.rank == 0) return run<T, T, 0>(p, stream);
  if (p.a.wide) return run<T, float, 1>(p, stream);
  p.rank <= 16 ? run<T, T, 1>(p, stream) : run<T, T, 2>(p, stream);
}

}  // namespace

void decode(const DecodeParams& p, cudaStream_t stream) {
  p.dtype == DType::kFloat16 ? run<Half>(p, stream) : run<BFloat16>(p, stream);
}

}  // namespace flashkern::sm80
