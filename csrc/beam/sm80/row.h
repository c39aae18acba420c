// A batch row as the kernel sees it: its logits, its part of the workspace, and shared memory where
// that is enough.
//
// A beam has a place for each of its chunks, up to whole spans: place = beam * places + chunk. What
// lies behind the last chunk has the key 0, as a chunk has of which nothing is allowed.
#pragma once

#include "beam/sm80/allowed.h"
#include "beam/sm80/plan.h"
#include "beam/sm80/select.h"

namespace flashkern::beam::sm80 {

static_assert(kSpanChunks == 4);  // a span's keys are a uint4

struct Storage {
  SelectStorage select;
  union {
    uint32_t allowed[kWarps][kMaskWords];  // while logits are scanned
    uint32_t spans[kSharedSpans];          // while chunks are ranked: which spans' chunks
    Candidate candidates[kSharedCandidates];
  };
  uint32_t chosen[kSharedChosen];
  uint32_t span_count, chosen_count, count;  // of listed spans, chosen chunks, candidates
  bool last;
};

struct Arguments {
  TopkParams problem;
  Plan plan;
  unsigned char* workspace;
  int* tickets;  // one for each batch row, then one for each beam
};

// A number: whatever else it tells follows from the arguments, which take no registers.
template <class T, bool kConstrained>
struct Row {
  const Arguments& args;
  Storage& shared;
  uint32_t index;

  FK_DEVICE Row(const Arguments& args, Storage& shared, uint32_t index)
      : args(args), shared(shared), index(index) {}

  FK_DEVICE uint32_t split() const { return blockIdx.x - index * args.plan.splits; }
  FK_DEVICE int64_t vocab() const { return args.problem.vocab; }
  FK_DEVICE uint32_t spans() const { return args.plan.spans; }       // of a beam
  FK_DEVICE uint32_t places() const { return 4 * args.plan.spans; }  // of a beam
  FK_DEVICE const T* beam(uint32_t b) const {
    const TopkParams& p = args.problem;
    return static_cast<const T*>(p.logits) + index * p.batch_stride + b * p.beam_stride;
  }
  FK_DEVICE int64_t beam_of_batch(uint32_t b) const { return index * args.problem.beams + b; }

  // Its part of the workspace, from so many bytes on.
  template <class V>
  FK_DEVICE V* own(int64_t offset) const {
    const Layout& layout = args.plan.layout;
    return reinterpret_cast<V*>(args.workspace + layout.ticket_bytes + index * layout.row_bytes +
                                offset);
  }

  // (beams, places): greatest logits, ordered; later their scores; 0: none.
  FK_DEVICE uint32_t* keys() const { return own<uint32_t>(0); }
  FK_DEVICE float2* sums() const {  // (beams, spans)
    return own<float2>(args.plan.layout.sums);
  }
  FK_DEVICE uint32_t* span_keys() const {  // (beams, spans): the greatest of a span's keys
    return own<uint32_t>(args.plan.layout.span_keys);
  }
  FK_DEVICE Normaliser* normalisers() const {  // (beams)
    return own<Normaliser>(args.plan.layout.normalisers);
  }
  FK_DEVICE uint32_t* masks(uint32_t place) const {  // what may be taken of chunks
    uint32_t* all = own<uint32_t>(args.plan.layout.masks);
    return all + int64_t{place} * kChunkWords;
  }
  FK_DEVICE bool may_take(uint32_t place, uint32_t element) const {
    if constexpr (kConstrained) {
      return masks(place)[element / 32] >> element % 32 & 1;
    } else {
      return element < vocab() - place % places() * kChunk;
    }
  }
  FK_DEVICE uint32_t* chosen() const {  // places of chunks to be read again
    if (args.plan.shared_chosen) return shared.chosen;
    return own<uint32_t>(args.plan.layout.chosen);
  }
  FK_DEVICE Candidate* candidates() const {
    if (args.plan.shared_candidates) return shared.candidates;
    return own<Candidate>(args.plan.layout.candidates);
  }
};

}  // namespace flashkern::beam::sm80
