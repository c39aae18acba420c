// h = scale * keep(x) A^T and dh = scale * dy B: rows x depth from memory, rows x rank back.
//
// A block owns 64 rows, one part of the depth and up to 64 columns of the rank; the sum is
// narrow.h's, where tiles, pipeline and numerics stand. Where the rows alone don't fill the machine
// the depth is cut into parts (plan.h), whose sums parts.cu adds in order.
//
// Several adapters: rows come sorted, so a block meets few of them; it walks its rows once for each
// and keeps the rows that are that adapter's.
//
// Dropout: a mask is four words of Philox for four columns, made where x lies in shared memory;
// equal, bit for bit, to the CPU's.
//
// Hu et al.: LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685).
#include "lora/sm80/kernels.h"
#include "lora/sm80/narrow.h"
#include "ptx/launch.h"

namespace flashkern::sm80 {
namespace {

struct Params {
  ShrinkParams call;
  bool aligned;
  int64_t part_depth;
  float* out;  // (parts, rows, rank)
};

template <int kStrips>
FK_DEVICE void store(const Params& p, int64_t first, int adapter, int rank_begin,
                     const float (&sums)[kStrips][4]) {
  const ShrinkParams& call = p.call;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
  float scale = call.scale;
  if (call.scales != nullptr && adapter >= 0) scale = static_cast<float>(call.scales[adapter]);
  float* out = p.out + int64_t{blockIdx.y} * call.rows * call.rank;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t position = first + row + 8 * half;
    if (position >= call.rows || call.order.adapter(position) != adapter) continue;
    float* to = out + call.order.row(position) * call.rank;
#pragma unroll
    for (int j = 0; j < kStrips; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int rank = rank_begin + 8 * j + lane % 4 * 2 + e;
        if (rank < call.rank) to[rank] = scale * sums[j][2 * half + e];
      }
    }
  }
}

template <class T, int kRanks>
__global__ void __launch_bounds__(NarrowSum<T, kRanks, false>::kThreads, kResident<T, kRanks>)
    shrink_kernel(const Params p) {
  using Sum = NarrowSum<T, kRanks, false>;
  auto& shared = ptx::shared_storage<typename Sum::Storage>();
  const ShrinkParams& call = p.call;
  const int64_t first = int64_t{blockIdx.x} * kNarrowTile;
  const int64_t last = min(first + kNarrowTile, call.rows) - 1;
  const int64_t begin = blockIdx.y * p.part_depth, end = min(begin + p.part_depth, call.depth);
  NarrowTask task{call.left,
                  call.left_row,
                  p.aligned,
                  call.order,
                  call.keep,
                  first,
                  last + 1,
                  begin,
                  end,
                  call.right,
                  static_cast<int>(blockIdx.z) * kRanks,
                  call.rank,
                  0};
  const int from = call.order.adapter(first), to = call.order.adapter(last);
  for (int adapter = from; adapter <= to; ++adapter) {
    float sums[Sum::kStrips][4] = {};
    if (adapter >= 0) {
      if (call.order.empty(adapter)) continue;
      task.adapter = adapter;
      Sum(shared, task).run(sums);
    }
    store(p, first, adapter, task.rank_begin + Sum::first_rank(), sums);
  }
}

}  // namespace

void shrink(const ShrinkParams& call, void* workspace, cudaStream_t stream) {
  if (call.rows == 0 || call.rank == 0) return;
  const Parts parts = shrink_parts(call.rows, call.depth);
  float* out = parts.count > 1 ? static_cast<float*>(workspace) : call.out;
  for_dtype(call.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool fits = aligned(call.left, call.left_row * sizeof(T));
    const Params p{call, fits, parts.step, out};
    const auto run = [&](auto ranks) {
      constexpr int kRanks = decltype(ranks)::value;
      const dim3 grid(divide_up(call.rows, kNarrowTile), parts.count, divide_up(call.rank, kRanks));
      using Sum = NarrowSum<T, kRanks, false>;
      const ptx::LaunchShape shape{grid, Sum::kThreads, sizeof(typename Sum::Storage)};
      ptx::launch(shrink_kernel<T, kRanks>, shape, stream, p);
    };
    if (narrow_ranks(call.rank) == 16) {
      run(std::integral_constant<int, 16>());
    } else {
      run(std::integral_constant<int, 64>());
    }
  });
  if (parts.count > 1) {
    add_parts(out, parts.count, call.rows * call.rank, call.out, DType::kFloat32, stream);
  }
}

}  // namespace flashkern::sm80
