// The k best continuations of every batch row's beams: log-softmax, beam scores and top-k in one
// launch and one read of the logits. (In a captured graph two nodes: before the kernel a memset of
// its tickets, tickets.h.)
//
//   scan     every block: spans of 4 chunks of 512 logits, a warp each. Leaves the chunks' greatest
//            logits and each span's (greatest, sum of exponentials) in the workspace (scan.h)
//   end      a ticket for each beam: the block that scans a beam's last span takes the beam's
//            log-sum-exp, and scores its chunks' greatest logits (rank.h): on all processors
//   ticket   one for each batch row: the block that comes last chooses; the others are done
//   rank     the k-th best chunk over all beams: k candidates reach it, so no lower one is needed.
//            Among many chunks those of the k best spans alone are looked at (rank.h)
//   gather   the about k chunks that reach it are read again: their elements that do
//   choose   these sorted, the first k written
//
//   block    512 threads, 16 warps; blocks of a batch row: `splits`, whose warps share its spans
//
//     beam 0 |span 0: c c c c|span 1: c c c c| ... |     warp w of split s takes spans
//     beam 1 |span n: c c c c| ...                       s split_spans + w, + 16, + 32, ...
//
//   memory   histogram 8 KiB; the best spans (8192), then candidates (4096), 32 KiB; chosen chunks
//            7 KiB: 47.3 KiB, two blocks on every processor from 8.0 on. k > 1593 (chunks) or
//            k > 2048 (candidates) keeps these in the workspace: the same code, other pointers
//   pipe     registers: the next chunk's loads are under way while one is reduced; a warp or block
//            that goes over keys has 64 bytes of each thread under way; the chosen chunks
//            are called into the L2 cache all at once, where the gather finds them
//
// Constraints (beam/params.h): in a second form of the kernel a chunk's maximum is that of the
// elements that the beam may take (allowed.h). The scan leaves these in the workspace, a bit for
// each logit, for the gather to ask of what reaches the threshold. Where fewer than k are left the
// threshold falls to nothing, and the places behind them hold nobody.
//
// Numerics and order: beam/score.h, the CPU kernels' own. Sums run in a fixed order (lanes of a
// span, spans of a beam), so a row's bits depend on neither its batch, the GPU nor an address.
//
// Work: the gather reads at most k + k/8 chunks whatever the values are. Where more elements pass
// than fit (ascending logits, all equal), the range of the k-th is narrowed over the same chunks,
// two reads of them a round, mostly one round; then they are gathered once more. docs/beam.md tells
// what the one block that chooses costs.
//
// Papers: Milakov and Gimelshein (arXiv 1805.02867), one pass for softmax and top-k; Gaihre et al.,
// Dr. Top-k (arXiv 2109.08219), selection through the maxima of subranges.
#include "beam/gpu.h"
#include "beam/sm80/rank.h"
#include "beam/sm80/row.h"
#include "beam/sm80/scan.h"
#include "beam/sm80/tickets.h"
#include "ptx/launch.h"

namespace flashkern {
namespace beam::sm80 {
namespace {

template <class T, bool kConstrained>
FK_DEVICE void scan(const Arguments& args, Storage& shared, const Row<T, kConstrained>& row) {
  const uint32_t begin = row.split() * args.plan.split_spans, lane = ptx::lane_id();
  const uint32_t end = min(begin + args.plan.split_spans, args.plan.row_spans);
  const bool want_sum = args.problem.given_logsumexp == nullptr;
  for (uint32_t i = begin + ptx::warp_id(); i < end; i += kWarps) {
    uint32_t* words = shared.allowed[i % kWarps];
    const uint32_t beam = i / row.spans(), first = (i - beam * row.spans()) * kSpanChunks;
    const uint32_t last =
        min(first + static_cast<uint32_t>(kSpanChunks), static_cast<uint32_t>(args.plan.chunks));
    if constexpr (kConstrained) {
      const Constraints& c = args.problem.constraints;
      allow(c, words, row.beam_of_batch(beam), first * kChunk, row.vocab());
      const uint2 own = reinterpret_cast<const uint2*>(words)[lane];
      const bool something = __any_sync(ptx::kAllLanes, (own.x | own.y) != 0);
      if (something) reinterpret_cast<uint2*>(row.masks(i * kSpanChunks))[lane] = own;
    }
    const auto masks = [&](uint32_t chunk) {
      if constexpr (kConstrained) {
        return allowed<T>(words + (chunk - first) * kChunkWords);
      } else {
        return AllElements();
      }
    };
    const T* logits = row.beam(beam);
    SpanSum total;
    const uint32_t best = [&] {
      if constexpr (kConstrained) {
        if (!want_sum) return scan_allowed(logits, row.vocab(), first, last, masks);
      }
      return scan_span<kConstrained>(logits, row.vocab(), first, last, want_sum, masks, total);
    }();
    const float sum = warp_sum(total.sum);
    if (want_sum && lane == 0) row.sums()[i] = {total.greatest, sum};
    if (lane < kSpanChunks) row.keys()[i * kSpanChunks + lane] = best;
  }
}

// Whether this block is the last of its row's; then it sees what all of them have written. The
// barriers carry thread 0's release and acquire to and from the block's other threads.
FK_DEVICE bool comes_last(const Arguments& args, Storage& shared, uint32_t row) {
  __syncthreads();
  if (args.plan.splits == 1) return true;
  if (threadIdx.x == 0) shared.last = draws_last(args.tickets + row, args.plan.splits);
  __syncthreads();
  return shared.last;
}

// Calls f for this lane's elements of the warp's share of the chosen chunks, but for those that
// score less than `low`; `more()` before each chunk, stops where it says no. All lanes of a warp
// get there together.
template <class T, bool kConstrained, class F, class More>
FK_DEVICE void each_chosen(const Row<T, kConstrained>& row, Candidate low, F&& f, More&& more) {
  const float least = score_of(ordered_of(low));
  const uint32_t count = row.shared.chosen_count;
  for (uint32_t i = ptx::warp_id(); i < count && more(); i += kWarps) {
    const uint32_t place = row.chosen()[i], beam = place / row.places(),
                   index = place % row.places();
    const uint32_t flat = beam * row.vocab() + index * kChunk;
    const Normaliser n = row.normalisers()[beam];
    Chunk<T> chunk;
    load_chunk(chunk, row.beam(beam), index, row.vocab());
    each_element(chunk, [&](float x, uint32_t element) {
      if (score(x, n.shift, n.log_sum, n.beam_score) < least) return;  // as most do
      if (row.may_take(place, element)) f(candidate(ordered(score(x, n)), flat + element));
    });
  }
}

// Collects the candidates that reach `low`: at least k, or all that there are. Returns their
// number.
template <class T, bool kConstrained>
FK_DEVICE uint32_t gather(const Arguments& args, Storage& shared, const Row<T, kConstrained>& row,
                          Candidate low) {
  const uint32_t k = args.problem.k, capacity = args.plan.capacity;
  Range range;
  range.low = low;
  const auto elements = [&](auto&& f) { each_chosen(row, range.low, f, [] { return true; }); };
  for (;;) {
    bool full = false;
    const auto add = [&](Candidate c) {
      if (c < range.low || full) return;
      const uint32_t slot = atomicAdd(&shared.count, 1u);
      full = slot >= capacity;
      if (!full) row.candidates()[slot] = c;
    };
    each_chosen(row, range.low, add, [&] { return !__any_sync(ptx::kAllLanes, full); });
    __syncthreads();
    const uint32_t count = shared.count;
    if (count <= capacity) return count;
    while (narrow(shared.select, range, k, elements) > capacity) {
    }
    if (ptx::thread_id() == 0) shared.count = 0;
    __syncthreads();
  }
}

template <class T, bool kConstrained>
FK_DEVICE void choose(const Arguments& args, const Row<T, kConstrained>& row, uint32_t count) {
  const TopkParams& p = args.problem;
  uint32_t size = 1;
  while (size < count) size *= 2;
  for (uint32_t i = count + ptx::thread_id(); i < size; i += kThreads)
    row.candidates()[i] = kNobody;
  __syncthreads();
  sort(row.candidates(), size);
  for (uint32_t i = threadIdx.x; i < p.k; i += kThreads) {
    put(p, row.index * p.k + i, i < size ? row.candidates()[i] : kNobody);
  }
}

template <class T, bool kConstrained>
__global__ void __launch_bounds__(kThreads, 2) topk(const __grid_constant__ Arguments args) {
  auto& shared = ptx::shared_storage<Storage>();
  const Row<T, kConstrained> row(args, shared, blockIdx.x / args.plan.splits);
  scan(args, shared, row);
  end_beams(args, row);
  if (!comes_last(args, shared, row.index)) return;
  const Candidate low = rank(args, shared, row);
  choose(args, row, gather(args, shared, row, low));
}

Plan plan_here(const TopkParams& p) {
  int device, processors;
  ptx::check(cudaGetDevice(&device), "device");
  ptx::check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
             "processors");
  return plan_launch(p, processors);
}

template <class T>
void launch(const Arguments& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.plan.blocks));
  const Constraints& c = args.problem.constraints;
  if (c.nodes != nullptr || c.excluded != nullptr) {
    ptx::launch(topk<T, true>, {grid, kThreads, sizeof(Storage)}, stream, args);
  } else {
    ptx::launch(topk<T, false>, {grid, kThreads, sizeof(Storage)}, stream, args);
  }
}

}  // namespace
}  // namespace beam::sm80

namespace gpu {

int64_t beam_topk_workspace(const beam::TopkParams& params) {
  const beam::sm80::Plan plan = beam::sm80::plan_launch(params, 1);
  return plan.workspace_bytes;
}

void beam_topk(const beam::TopkParams& params, void* workspace, GpuStream stream) {
  if (params.batch == 0) return;
  beam::sm80::Arguments args{params, beam::sm80::plan_here(params),
                             static_cast<unsigned char*>(workspace), nullptr};
  if (args.plan.splits > 1) {
    args.tickets = beam::sm80::tickets_for(stream, args.plan.tickets, static_cast<int*>(workspace));
  }
  switch (params.dtype) {
    case DType::kBFloat16:
      return beam::sm80::launch<BFloat16>(args, stream);
    case DType::kFloat16:
      return beam::sm80::launch<Half>(args, stream);
    default:
      return beam::sm80::launch<float>(args, stream);
  }
}

}  // namespace gpu
}  // namespace flashkern
