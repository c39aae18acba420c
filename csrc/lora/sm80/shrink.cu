// h = scale * keep(x) A^T and dh = scale * dy B: rows x depth from memory, rows x rank back.
//
// A block owns up to 64 rows of one adapter, one part of the depth and up to 64 columns of the
// rank; the sum is narrow.h's, where tiles, pipeline and numerics stand. Where the rows alone don't
// fill the machine the depth is cut into parts (plan.h): the block that comes last of those for the
// same rows and columns adds the parts, in their order, whatever the order they came in. Tickets
// tell which one that is.
//
// Several adapters: rows come sorted and are cut at every 64th position and wherever an adapter's
// rows begin, so that the blocks of a tile's adapters run side by side.
//
// Dropout: a mask is four words of Philox for four columns, made where x lies in shared memory;
// equal, bit for bit, to the CPU's.
//
// Hu et al.: LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685).
#include "beam/sm80/tickets.h"
#include "lora/sm80/kernels.h"
#include "lora/sm80/narrow.h"
#include "ptx/global.h"
#include "ptx/launch.h"

namespace flashkern::sm80 {
namespace {

struct Params {
  ShrinkParams call;
  bool aligned, paired;
  int64_t part_depth;
  float* out;    // (parts, rows, rank)
  int* tickets;  // for each block of a part: how many parts are there; zeros before and after, for
                 // the stream's beam top-k counts with the same
};

// Positions [begin, end) have one adapter, -1 for none.
struct Segment {
  int64_t begin, end;
  int adapter;
};

// Cuts, in order: at each tile's start and, before it where they meet, at each adapter's. Segment
// `index` follows the cut of that number; `before` of the cuts up to it are adapters'.
FK_DEVICE Segment segment_of(const RowOrder& order, int64_t rows, int index) {
  int before = 0;
  for (int above = order.ids != nullptr ? order.count : 0; before < above;) {
    const int middle = (before + above) / 2;
    const int tiles = (order.starts[middle] + kNarrowTile - 1) / kNarrowTile;
    if (middle + tiles <= index) {
      before = middle + 1;
    } else {
      above = middle;
    }
  }
  const int64_t tiles = index + 1 - before;
  Segment s{(tiles - 1) * kNarrowTile, min(tiles * kNarrowTile, rows), 0};
  if (order.ids == nullptr) return s;
  s.adapter = before - 1;
  if (before > 0) s.begin = max(s.begin, int64_t{order.starts[before - 1]});
  if (before < order.count) s.end = min(s.end, int64_t{order.starts[before]});
  return s;
}

template <int kStrips>
FK_DEVICE void store(const Params& p, const Segment& segment, int rank_begin,
                     const float (&sums)[kStrips][4]) {
  const ShrinkParams& call = p.call;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
  float scale = call.scale;
  if (call.scales != nullptr && segment.adapter >= 0) {
    scale = static_cast<float>(call.scales[segment.adapter]);
  }
  float* out = p.out + int64_t{blockIdx.y} * call.rows * call.rank;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t position = segment.begin + row + 8 * half;
    if (position >= segment.end) continue;
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

// Whether this block is the last of those for its rows and columns; then it sees what all of them
// have written. The barriers carry thread 0's release and acquire to and from the others.
FK_DEVICE bool comes_last(const Params& p) {
  bool last = false;
  __syncthreads();
  if (threadIdx.x == 0) {
    int* ticket = p.tickets + blockIdx.z * gridDim.x + blockIdx.x;
    last = ptx::add_acquire_release(ticket, 1) == static_cast<int>(gridDim.y) - 1;
    if (last) *ticket = 0;  // for the next launch
  }
  return __syncthreads_or(last);
}

template <int kRanks>
FK_DEVICE void add_parts(const Params& p, const Segment& segment, int rank_begin) {
  const ShrinkParams& call = p.call;
  const int count = static_cast<int>(segment.end - segment.begin) * kRanks;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int rank = rank_begin + i % kRanks;
    if (rank >= call.rank) continue;
    const int64_t at = call.order.row(segment.begin + i / kRanks) * call.rank + rank;
    float sum = 0.0f;
    for (int k = 0; k < static_cast<int>(gridDim.y); ++k) {
      sum += p.out[k * call.rows * call.rank + at];
    }
    call.out[at] = sum;
  }
}

template <class T, int kRanks, bool kWide>
__global__ void __launch_bounds__(NarrowSum<T, kRanks, false, kWide>::kThreads, kResident<kRanks>)
    shrink_kernel(const Params p) {
  using Sum = NarrowSum<T, kRanks, false, kWide>;
  auto& shared = ptx::shared_storage<typename Sum::Storage>();
  const ShrinkParams& call = p.call;
  const Segment segment = segment_of(call.order, call.rows, blockIdx.x);
  if (segment.begin >= segment.end) return;
  const int64_t begin = blockIdx.y * p.part_depth, end = min(begin + p.part_depth, call.depth);
  const int rank_begin = static_cast<int>(blockIdx.z) * kRanks;
  const NarrowTask task{
      call.left, call.left_row, p.aligned,  call.order, call.keep,  segment.begin, segment.end,
      begin,     end,           call.right, p.paired,   rank_begin, call.rank,     segment.adapter};
  float sums[Sum::kStrips][4] = {};
  if (segment.adapter >= 0) Sum(shared, task).run(sums);
  store(p, segment, rank_begin + Sum::first_rank(), sums);
  if (gridDim.y > 1 && comes_last(p)) add_parts<kRanks>(p, segment, rank_begin);
}

template <class T, bool kWide>
void run(const Params& p, dim3 grid, cudaStream_t stream) {
  for_ranks(p.call.rank, [&](auto ranks) {
    constexpr int kRanks = decltype(ranks)::value;
    using Sum = NarrowSum<T, kRanks, false, kWide>;
    const ptx::LaunchShape shape{grid, Sum::kThreads, sizeof(typename Sum::Storage)};
    ptx::launch(shrink_kernel<T, kRanks, kWide>, shape, stream, p);
  });
}

}  // namespace

void shrink(const ShrinkParams& call, void* workspace, cudaStream_t stream) {
  if (call.rows == 0 || call.rank == 0) return;
  const Parts parts = shrink_parts(call.rows, call.depth);
  const int64_t several = call.order.ids != nullptr ? call.order.count : 0;
  const dim3 grid(shrink_segments(call.rows, several), parts.count,
                  divide_up(call.rank, narrow_ranks(call.rank)));
  Params p{call, false, false, parts.step, call.out, nullptr};
  if (parts.count > 1) {
    const int64_t sums = padded_bytes(4 * parts.count * call.rows * call.rank);
    auto* in_workspace = reinterpret_cast<int*>(static_cast<char*>(workspace) + sums);
    p.out = static_cast<float*>(workspace);
    p.tickets = beam::sm80::tickets_for(stream, int64_t{grid.x} * grid.z, in_workspace);
  }
  for_dtype(call.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    p.aligned = aligned(call.left, call.left_row * sizeof(T));
    p.paired = pairs_lie_together(call.right, call.depth, call.right.wide ? 4 : sizeof(T));
    if constexpr (!std::is_same_v<T, float>) {
      if (!call.right.wide) return run<T, false>(p, grid, stream);
    }
    run<T, true>(p, grid, stream);
  });
}

}  // namespace flashkern::sm80
