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
// h = scale * x A^T is computed by every block for itself, first, in the same way (A comes from L2,
// block 0 writes h): no block waits for another, and a decoding step is one launch. A and x are cut
// into bfloat16 pieces as in narrow.h, h and its product with B are float32.
//
// Shared memory: 8 partial sums of 32 x 8 strips and h, 13 KiB for 8 rows, 84 KiB for 64.
// Only rows of whole, aligned 16-byte chunks. Several adapters, dropout, ranks above 64: the shrink
// goes before, a launch of its own, and h is read; each row takes its own adapter's B.
//
// Chen et al.: Punica: Multi-Tenant LoRA Serving (arXiv 2310.18547) for shrink and expand as one
// step.
#include "lora/sm80/kernels.h"
#include "lora/sm80/narrow.h"
#include "ptx/launch.h"

namespace flashkern::sm80 {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kSlabs = 2, kDepth = 32;
constexpr int kColumns = kDecodeColumns;

template <int kStrips>
struct Storage {
  float part[kWarps][kColumns][8 * kStrips + 1];
  float h[8 * kStrips][kDecodeRank + 1];
};

template <int kStrips>
using Sums = float[kSlabs][kStrips][4];

// Eight elements of a row, as pairs.
struct Run {
  uint32_t pair[4];
};

template <class T>
FK_DEVICE Run load_run(const T* row, bool exists) {
  if (!exists) return {};
  const uint4 v = *reinterpret_cast<const uint4*>(row);
  return {{v.x, v.y, v.z, v.w}};
}

// x's runs at depth k for every strip.
template <class T, int kStrips>
FK_DEVICE void load_x(const DecodeParams& p, int64_t k, Run (&x)[kStrips]) {
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int j = 0; j < kStrips; ++j) {
    const int row = 8 * j + g;
    const bool exists = row < p.rows && k < p.in;
    x[j] = load_run(static_cast<const T*>(p.x) + (exists ? row * p.x_row + k : 0), exists);
  }
}

// sums += rows [first, first + 32) of W by x, this warp's share of the depth.
template <class T, int kStrips>
FK_DEVICE void add_base(const DecodeParams& p, int64_t first, Sums<kStrips>& sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll(kStrips < 8 ? 2 : 1)
  for (int64_t step = warp * kDepth; step < p.in; step += kWarps * kDepth) {
    const int64_t k = step + lane % 4 * 8;
    Run w[kSlabs][2], x[kStrips];
#pragma unroll
    for (int i = 0; i < 2 * kSlabs; ++i) {
      const int64_t row = first + 8 * i + lane / 4;
      const bool exists = row < p.out && k < p.in;
      w[i / 2][i % 2] =
          load_run(static_cast<const T*>(p.weight) + (exists ? row * p.in + k : 0), exists);
    }
    load_x<T>(p, k, x);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t right[kStrips][2];
#pragma unroll
      for (int j = 0; j < kStrips; ++j) {
        right[j][0] = x[j].pair[2 * half], right[j][1] = x[j].pair[2 * half + 1];
      }
#pragma unroll
      for (int i = 0; i < kSlabs; ++i) {
        const uint32_t left[4] = {w[i][0].pair[2 * half], w[i][1].pair[2 * half],
                                  w[i][0].pair[2 * half + 1], w[i][1].pair[2 * half + 1]};
        ptx::mma_strip<T>(sums[i], left, right);
      }
    }
  }
}

// Two pairs of A's row `rank`, from k on, in pieces.
template <class T>
FK_DEVICE void cut_a(const DecodeParams& p, int rank, int64_t k, uint32_t (&pieces)[2][3]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float2 v = {0.0f, 0.0f};
    if (rank < p.rank && k < p.in) {
      const int64_t offset = p.a.offset(0, rank, k + 2 * i);
      v = {p.a.load<T>(offset), p.a.load<T>(offset + 1)};
    }
    cut_pair(v, pieces[i]);
  }
}

template <class T, int kStrips>
FK_DEVICE void cut_x(const Run (&x)[kStrips], int half, int piece, uint32_t (&right)[kStrips][2]) {
#pragma unroll
  for (int j = 0; j < kStrips; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t pair = x[j].pair[2 * half + i];
      if constexpr (kLeftPieces<T> == 1) {
        right[j][i] = pair;
      } else {
        uint32_t pieces[kLeftPieces<T>];
        cut_pair(ptx::unpack<T>(pair), pieces);
        right[j][i] = pieces[piece];
      }
    }
  }
}

// sums += rows [first, first + 32) of A by x, this warp's share of the depth.
template <class T, int kStrips>
FK_DEVICE void add_low(const DecodeParams& p, int first, Sums<kStrips>& sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t step = warp * kDepth; step < p.in; step += kWarps * kDepth) {
    const int64_t k = step + lane % 4 * 8;
    Run x[kStrips];
    load_x<T>(p, k, x);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kSlabs; ++i) {
        if (first + 16 * i >= p.rank) break;
        uint32_t upper[2][3], lower[2][3];
        cut_a<T>(p, first + 16 * i + lane / 4, k + 4 * half, upper);
        cut_a<T>(p, first + 16 * i + 8 + lane / 4, k + 4 * half, lower);
#pragma unroll
        for (int r = 0; r < kLeftPieces<T>; ++r) {
          uint32_t right[kStrips][2];
          cut_x<T>(x, half, r, right);
#pragma unroll
          for (int l = 0; l + r < 3; ++l) {
            const uint32_t left[4] = {upper[0][l], lower[0][l], upper[1][l], lower[1][l]};
            ptx::mma_strip<BFloat16>(sums[i], left, right);
          }
        }
      }
    }
  }
}

// Hands the warps' sums to shared memory; then sum_of(column, row) may be asked.
template <int kStrips>
FK_DEVICE void meet(Storage<kStrips>& shared, const Sums<kStrips>& sums) {
  const int lane = threadIdx.x % 32;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSlabs; ++i) {
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

template <int kStrips>
FK_DEVICE float sum_of(const Storage<kStrips>& shared, int column, int row) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += shared.part[w][column][row];
  return sum;
}

template <class T, int kStrips>
__global__ void __launch_bounds__(kThreads, kStrips == 8 ? 1 : 2)
    decode_kernel(const DecodeParams p) {
  auto& shared = ptx::shared_storage<Storage<kStrips>>();
  for (int first = 0; p.shrinks && first < p.rank; first += kColumns) {
    Sums<kStrips> sums = {};
    add_low<T, kStrips>(p, first, sums);
    meet(shared, sums);
    for (int i = threadIdx.x; i < kColumns * p.rows; i += kThreads) {
      const int rank = first + i % kColumns, row = i / kColumns;
      if (rank >= p.rank) continue;
      const float value = p.scale * sum_of(shared, i % kColumns, row);
      shared.h[row][rank] = value;
      if (blockIdx.x == 0) p.h[row * p.rank + rank] = value;
    }
  }
  const int64_t first = int64_t{blockIdx.x} * kColumns;
  Sums<kStrips> sums = {};
  add_base<T, kStrips>(p, first, sums);
  meet(shared, sums);
  for (int i = threadIdx.x; i < kColumns * p.rows; i += kThreads) {
    const int64_t column = first + i % kColumns;
    const int row = i / kColumns;
    if (column >= p.out) continue;
    const int adapter = p.ids != nullptr ? adapter_of(p.ids, row, p.count) : 0;
    const float* h = p.shrinks ? shared.h[row] : p.h + row * p.rank;
    float value = sum_of(shared, i % kColumns, row);
    for (int r = 0; adapter >= 0 && r < p.rank; ++r) {
      value = __fmaf_rn(h[r], p.b.at<T>(adapter, column, r), value);
    }
    if (p.bias != nullptr) value += ptx::to_float(static_cast<const T*>(p.bias)[column]);
    static_cast<T*>(p.y)[row * p.out + column] = ptx::from_float<T>(value);
  }
}

template <class T>
void run(const DecodeParams& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(divide_up(p.out, kColumns));
  const auto launch = [&](auto strips) {
    constexpr int kStrips = decltype(strips)::value;
    const ptx::LaunchShape shape{blocks, kThreads, sizeof(Storage<kStrips>)};
    ptx::launch(decode_kernel<T, kStrips>, shape, stream, p);
  };
  if (p.rows <= 8) {
    launch(std::integral_constant<int, 1>());
  } else if (p.rows <= 16) {
    launch(std::integral_constant<int, 2>());
  } else {
    launch(std::integral_constant<int, 8>());
  }
}

}  // namespace

void decode(const DecodeParams& p, cudaStream_t stream) {
  p.dtype == DType::kFloat16 ? run<Half>(p, stream) : run<BFloat16>(p, stream);
}

}  // namespace flashkern::sm80
