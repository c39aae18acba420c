// The k best continuations of every batch row's beams: log-softmax, beam scores and top-k in one
// launch and one read of the logits.
//
//   scan     every block: spans of 4 chunks of 512 logits, a warp each. Leaves a chunk's greatest
//            logit and each span's (greatest, sum of exponentials) in the workspace (scan.h)
//   ticket   the block of a batch row that comes last chooses for the row; the others are done
//   rank     the beams' log-sum-exp; the score of each chunk's greatest logit; the k-th best of
//            these over all beams: k candidates reach it, so no lower one is needed
//   gather   the about k chunks that reach it are read again (from L2): their elements that do
//   choose   these sorted, the first k written
//
//   block    512 threads, 16 warps; blocks of a batch row: `splits`, whose warps share its spans
//
//     beam 0 |span 0: c c c c|span 1: c c c c| ... |     warp w of split s takes spans
//     beam 1 |span n: c c c c| ...                       s split_spans + w, + 16, + 32, ...
//
//   memory   histogram 8 KiB; chunk scores (8192), then candidates (4096), 32 KiB; chosen chunks
//            7 KiB: 47.3 KiB, two blocks on every processor from 8.0 on. A row with more chunks, or
//            k > 2048, keeps the rest in the workspace: the same code, other pointers
//   pipe     registers: the next chunk's loads are under way while one is reduced
//
// Constraints (beam/params.h): a second form of the kernel masks both passes over a chunk
// (allowed.h; 1 KiB of shared memory more, so that a block has to ask for what is beyond 48 KiB;
// two still fit everywhere): its maximum is that of the elements that the beam may take. Where
// fewer than k are left the threshold falls to nothing, and the places behind them hold nobody.
//
// Numerics and order: beam/score.h, the CPU kernels' own. Sums run in a fixed order (lanes of a
// span, spans of a beam), so a row's bits depend on neither its batch, the GPU nor an address.
//
// Work: the gather reads at most k + k/8 chunks whatever the values are. Where more elements pass
// than fit (ascending logits, all equal), the range of the k-th is narrowed over the same chunks,
// two reads of them a round, mostly one round; then they are gathered once more.
//
// Papers: Milakov and Gimelshein (arXiv 1805.02867), one pass for softmax and top-k; Gaihre et al.,
// Dr. Top-k (arXiv 2109.08219), selection through the maxima of subranges.
#include "beam/gpu.h"
#include "beam/sm80/allowed.h"
#include "beam/sm80/plan.h"
#include "beam/sm80/scan.h"
#include "beam/sm80/select.h"
#include "beam/sm80/tickets.h"
#include "ptx/global.h"
#include "ptx/launch.h"

#include <type_traits>

namespace flashkern {
namespace beam::sm80 {
namespace {

struct Storage {
  SelectStorage select;
  union {
    uint32_t keys[kSharedKeys];
    Candidate candidates[kSharedCandidates];
  };
  uint32_t chosen[kSharedChosen];
  uint32_t count;  // of chosen chunks, then of candidates
  bool last;
};

struct ConstrainedStorage : Storage {
  uint32_t allowed[kWarps][kMaskWords];
};

template <bool kConstrained>
using StorageOf = std::conditional_t<kConstrained, ConstrainedStorage, Storage>;

struct Arguments {
  TopkParams problem;
  Plan plan;
  unsigned char* workspace;
  int* tickets;  // one for each batch row
};

// A batch row: its logits, its part of the workspace, and shared memory where that is enough.
template <class T, bool kConstrained>
struct Row {
  const Constraints& constraints;
  uint32_t* allowed_words = nullptr;  // the warp's own
  const T* logits;
  int64_t beam_stride, vocab;
  uint32_t index, beams, chunks, spans, total_chunks;  // chunks, spans: of a beam
  uint32_t* maxima;                                    // (beams, chunks): logits, ordered; 0: none
  float2* span_sums;                                   // (beams, spans)
  Normaliser* normalisers;
  uint32_t *keys, *chosen;  // ordered scores of chunks; chunks to be read again
  Candidate* candidates;

  FK_DEVICE Row(const Arguments& args, StorageOf<kConstrained>& shared, uint32_t row)
      : constraints(args.problem.constraints) {
    if constexpr (kConstrained) allowed_words = shared.allowed[ptx::warp_id()];
    const TopkParams& p = args.problem;
    const Plan& plan = args.plan;
    unsigned char* own = args.workspace + plan.layout.ticket_bytes + row * plan.layout.row_bytes;
    logits = static_cast<const T*>(p.logits) + row * p.batch_stride;
    beam_stride = p.beam_stride, vocab = p.vocab;
    index = row, beams = p.beams, chunks = plan.chunks, spans = plan.spans;
    total_chunks = plan.row_chunks;
    maxima = reinterpret_cast<uint32_t*>(own);
    span_sums = reinterpret_cast<float2*>(own + plan.layout.spans);
    normalisers = reinterpret_cast<Normaliser*>(own + plan.layout.normalisers);
    keys = plan.shared_keys ? shared.keys : maxima;
    chosen =
        plan.shared_chosen ? shared.chosen : reinterpret_cast<uint32_t*>(own + plan.layout.chosen);
    candidates = plan.shared_candidates
                     ? shared.candidates
                     : reinterpret_cast<Candidate*>(own + plan.layout.candidates);
  }

  FK_DEVICE const T* beam(uint32_t b) const { return logits + b * beam_stride; }

  // Which of this lane's elements of a chunk beam b may take.
  FK_DEVICE auto mask(uint32_t b, uint32_t chunk) const {
    if constexpr (kConstrained) {
      const int64_t at = int64_t{index} * beams + b;
      return allowed<T>(constraints, allowed_words, at, chunk * kChunk, vocab);
    } else {
      return AllElements();
    }
  }
};

template <class T, bool kConstrained>
FK_DEVICE void scan(const Arguments& args, const Row<T, kConstrained>& row, uint32_t split) {
  const uint32_t begin = split * args.plan.split_spans;
  const uint32_t end = min(begin + args.plan.split_spans, args.plan.row_spans);
  const bool want_sum = args.problem.given_logsumexp == nullptr;
  for (uint32_t i = begin + ptx::warp_id(); i < end; i += kWarps) {
    const uint32_t beam = i / row.spans, first = i % row.spans * kSpanChunks;
    const uint32_t last = min(first + static_cast<uint32_t>(kSpanChunks), row.chunks);
    uint32_t* maxima = row.maxima + beam * row.chunks;
    const auto masks = [&](uint32_t chunk) { return row.mask(beam, chunk); };
    if constexpr (kConstrained) {
      if (!want_sum) {
        scan_allowed(row.beam(beam), row.vocab, first, last, masks, maxima);
        continue;
      }
    }
    scan_span<kConstrained>(row.beam(beam), row.vocab, first, last, want_sum, masks, maxima,
                            row.span_sums + i);
  }
}

// Whether this block is the last of its row's; then it sees what all of them have written. The
// barriers carry thread 0's release and acquire to and from the block's other threads.
FK_DEVICE bool comes_last(const Arguments& args, Storage& shared, uint32_t row) {
  __syncthreads();
  if (args.plan.splits == 1) return true;
  if (threadIdx.x == 0) {
    int* ticket = args.tickets + row;
    shared.last = ptx::add_acquire_release(ticket, 1) == args.plan.splits - 1;
    if (shared.last) *ticket = 0;  // for the next launch
  }
  __syncthreads();
  return shared.last;
}

template <class T, bool kConstrained>
FK_DEVICE void normalise(const Arguments& args, const Row<T, kConstrained>& row) {
  const TopkParams& p = args.problem;
  for (uint32_t b = ptx::warp_id(); b < row.beams; b += kWarps) {
    const int64_t at = int64_t{row.index} * row.beams + b;
    Normaliser n{0.f, 0.f, p.beam_scores[at]};
    float logsumexp;
    if (p.given_logsumexp != nullptr) {
      n.shift = logsumexp = p.given_logsumexp[at];
    } else {
      n = normaliser(row.span_sums + b * row.spans, row.spans, n.beam_score, logsumexp);
    }
    if (ptx::lane_id() != 0) continue;
    row.normalisers[b] = n;
    p.logsumexp[at] = logsumexp;
  }
  __syncthreads();
}

// Chooses the chunks to read again: at least those with the k best greatest logits. Returns a
// candidate that at least k elements reach, all of them in these chunks.
template <class T, bool kConstrained>
FK_DEVICE Candidate rank(const Arguments& args, Storage& shared, const Row<T, kConstrained>& row) {
  const uint32_t k = args.problem.k;
  const bool all = row.total_chunks < k;
  for (uint32_t c = threadIdx.x; c < row.total_chunks; c += kThreads) {
    if (all) {
      row.chosen[c] = c;
    } else {
      const uint32_t best = row.maxima[c];
      const Normaliser n = row.normalisers[c / row.chunks];
      row.keys[c] = kConstrained && best == 0 ? 0 : ordered(score(score_of(best), n));
    }
  }
  if (threadIdx.x == 0) shared.count = all ? row.total_chunks : 0;
  __syncthreads();
  if (all) return 0;

  const auto chunks = [&](auto&& f) {  // equal ones: the first is the better
    for (uint32_t c = threadIdx.x; c < row.total_chunks; c += kThreads) {
      f(candidate(row.keys[c], c));
    }
  };
  Range range;
  while (narrow(shared.select, range, k, chunks) > args.plan.chosen_limit) {
  }
  chunks([&](Candidate c) {
    if (c >= range.low) row.chosen[atomicAdd(&shared.count, 1u)] = index_of(c);
  });
  __syncthreads();
  // Elements equal to the threshold count up to the end of the last chunk that was chosen for being
  // equal: each chosen chunk has one that is greater, or equal and not behind that.
  const uint32_t last = min(index_of(range.low), row.total_chunks - 1);
  const int64_t end = min((last % row.chunks + 1) * kChunk, row.vocab);
  return candidate(ordered_of(range.low), last / row.chunks * row.vocab + end - 1);
}

// Calls f for this lane's elements of the warp's share of the chosen chunks, `more()` before each
// chunk; stops where it says no. All lanes of a warp get there together.
template <class T, bool kConstrained, class F, class More>
FK_DEVICE void each_chosen(const Row<T, kConstrained>& row, uint32_t count, F&& f, More&& more) {
  const uint32_t warp = ptx::warp_id();
  for (uint32_t i = warp; i < count && more(); i += kWarps) {
    const uint32_t c = row.chosen[i], beam = c / row.chunks;
    const int64_t start = c % row.chunks * kChunk;
    const uint32_t flat = beam * row.vocab + start;
    const uint32_t left = min(kChunk, row.vocab - start);
    const Normaliser n = row.normalisers[beam];
    const auto mask = row.mask(beam, c % row.chunks);
    Chunk<T> chunk;
    load_chunk(chunk, row.beam(beam), c % row.chunks, row.vocab);
    each_element(chunk, mask, [&](float x, uint32_t element) {
      if (element < left) f(candidate(ordered(score(x, n)), flat + element));
    });
  }
}

// Collects the candidates that reach `low`: at least k, or all that there are. Returns their
// number.
template <class T, bool kConstrained>
FK_DEVICE uint32_t gather(const Arguments& args, Storage& shared, const Row<T, kConstrained>& row,
                          Candidate low) {
  const uint32_t k = args.problem.k, capacity = args.plan.capacity, chunks = shared.count;
  const auto elements = [&](auto&& f) { each_chosen(row, chunks, f, [] { return true; }); };
  Range range;
  range.low = low;
  for (;;) {
    __syncthreads();
    if (threadIdx.x == 0) shared.count = 0;
    __syncthreads();
    bool full = false;
    const auto add = [&](Candidate c) {
      if (c < range.low || full) return;
      const uint32_t slot = atomicAdd(&shared.count, 1u);
      full = slot >= capacity;
      if (!full) row.candidates[slot] = c;
    };
    each_chosen(row, chunks, add, [&] { return !__any_sync(ptx::kAllLanes, full); });
    __syncthreads();
    const uint32_t count = shared.count;
    if (count <= capacity) return count;
    while (narrow(shared.select, range, k, elements) > capacity) {
    }
  }
}

template <class T, bool kConstrained>
FK_DEVICE void choose(const Arguments& args, const Row<T, kConstrained>& row, uint32_t count) {
  const TopkParams& p = args.problem;
  uint32_t size = 1;
  while (size < count) size *= 2;
  for (uint32_t i = count + threadIdx.x; i < size; i += kThreads) row.candidates[i] = kNobody;
  __syncthreads();
  sort(row.candidates, size);
  for (uint32_t i = threadIdx.x; i < p.k; i += kThreads) {
    put(p, row.index * p.k + i, i < size ? row.candidates[i] : kNobody);
  }
}

template <class T, bool kConstrained>
__global__ void __launch_bounds__(kThreads, 2) topk(const __grid_constant__ Arguments args) {
  auto& shared = ptx::shared_storage<StorageOf<kConstrained>>();
  const uint32_t splits = args.plan.splits, index = blockIdx.x / splits;
  const Row<T, kConstrained> row(args, shared, index);
  scan(args, row, blockIdx.x % splits);
  if (!comes_last(args, shared, index)) return;
  normalise(args, row);
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
    ptx::launch(topk<T, true>, {grid, kThreads, sizeof(ConstrainedStorage)}, stream, args);
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
    args.tickets = beam::sm80::tickets_for(stream, params.batch, static_cast<int*>(workspace));
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
