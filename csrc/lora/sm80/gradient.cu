// dB = dy^T h and dA = dh^T keep(x): sums over the rows of each adapter.
//
// A block owns 64 columns of dy (x), up to 64 columns of the rank, one adapter and one part of its
// rows; the sum is narrow.h's, with the wide operand transposed on its way into the registers.
// Parts are cut evenly from an adapter's rows, so that their order is that of the rows; parts.cu
// adds them, and rounds where A and B are 16-bit. No atomics: the same bits, run after run.
//
// The store goes along the columns of dA (transposed) or along the rank of dB.
#include "lora/sm80/kernels.h"
#include "lora/sm80/narrow.h"
#include "ptx/launch.h"

namespace flashkern::sm80 {
namespace {

struct Params {
  GradientParams call;
  bool aligned;
  int parts;
  float* out;  // (parts, adapters, width, rank)
};

// Part `part` of adapter `adapter`'s rows: whole tiles of positions.
FK_DEVICE void cut_rows(const Params& p, int adapter, int part, int64_t& begin, int64_t& end) {
  const RowOrder& order = p.call.order;
  const int64_t first = order.ids != nullptr ? order.starts[adapter] : 0;
  const int64_t last = order.ids != nullptr ? order.starts[adapter + 1] : p.call.rows;
  const int64_t tiles = (last - first + kNarrowTile - 1) / kNarrowTile;
  const int64_t step = (tiles + p.parts - 1) / p.parts * kNarrowTile;
  begin = min(first + part * step, last);
  end = min(begin + step, last);
}

template <int kStrips>
FK_DEVICE void store(const Params& p, int64_t first, int rank_begin, float* out,
                     const float (&sums)[kStrips][4]) {
  const GradientParams& call = p.call;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < kStrips; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t column = first + row + e / 2 * 8;
      const int rank = rank_begin + 8 * j + lane % 4 * 2 + e % 2;
      if (column >= call.width || rank >= call.rank) continue;
      out[call.transposed ? rank * call.width + column : column * call.rank + rank] = sums[j][e];
    }
  }
}

template <class T, int kRanks>
__global__ void __launch_bounds__(NarrowSum<T, kRanks, true, true>::kThreads, kResident<kRanks>)
    gradient_kernel(const Params p) {
  using Sum = NarrowSum<T, kRanks, true, true>;
  auto& shared = ptx::shared_storage<typename Sum::Storage>();
  const GradientParams& call = p.call;
  const int tiles = divide_up(call.width, kNarrowTile);
  const int adapter = blockIdx.x / tiles / p.parts, part = blockIdx.x / tiles % p.parts;
  const int64_t first = int64_t{blockIdx.x % tiles} * kNarrowTile;
  const Factor right{call.right, true, 1, call.rank, 0};
  NarrowTask task{call.left,  call.left_row, p.aligned,
                  call.order, call.keep,     0,
                  0,          first,         call.width,
                  right,      false,         static_cast<int>(blockIdx.z) * kRanks,
                  call.rank,  adapter};
  cut_rows(p, adapter, part, task.row, task.row_end);
  float sums[Sum::kStrips][4] = {};
  Sum(shared, task).run(sums);
  const int64_t size = call.width * call.rank;
  store(p, first, task.rank_begin + Sum::first_rank(),
        p.out + (part * call.adapters + adapter) * size, sums);
}

}  // namespace

void gradient(const GradientParams& call, void* workspace, cudaStream_t stream) {
  if (call.width == 0 || call.rank == 0 || call.adapters == 0) return;
  const int64_t parts = gradient_parts(call.rows, call.width, call.adapters).count;
  const bool direct = parts == 1 && call.out_dtype == DType::kFloat32;
  float* out = static_cast<float*>(direct ? call.out : workspace);
  for_dtype(call.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool fits = aligned(call.left, call.left_row * sizeof(T));
    const Params p{call, fits, static_cast<int>(parts), out};
    const auto run = [&](auto ranks) {
      constexpr int kRanks = decltype(ranks)::value;
      const int64_t tiles = divide_up(call.width, kNarrowTile);
      const dim3 grid(tiles * call.adapters * parts, 1, divide_up(call.rank, kRanks));
      using Sum = NarrowSum<T, kRanks, true, true>;
      const ptx::LaunchShape shape{grid, Sum::kThreads, sizeof(typename Sum::Storage)};
      ptx::launch(gradient_kernel<T, kRanks>, shape, stream, p);
    };
    for_ranks(call.rank, run);
  });
  if (!direct) {
    const int64_t size = call.adapters * call.width * call.rank;
    add_parts(out, parts, size, call.out, call.out_dtype, stream);
  }
}

}  // namespace flashkern::sm80
