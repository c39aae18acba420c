// Which elements of a span a beam may take (beam/constraints.h): a bit for each.
//
// A warp sets them in 64 words of shared memory of its own, from the tokens of the lists that lie
// in the span: each list is met once for a span. Each lane takes the bits of the elements that it
// holds of a chunk (load.h), and leaves them in the workspace for those who read the chunk again:
// k chunks whose greatest allowed logits reach a threshold do hold k candidates. A token that is
// met twice, or lies outside the vocabulary, changes nothing.
#pragma once

#include "beam/constraints.h"
#include "beam/sm80/load.h"
#include "beam/sm80/plan.h"

namespace flashkern::beam::sm80 {

inline constexpr int kChunkWords = kChunk / 32, kMaskWords = kSpanChunks * kChunkWords;

// The first of some ascending tokens that is not below `wanted`, by a warp: 32 probes a round.
FK_DEVICE uint32_t lower_bound(const int32_t* tokens, uint32_t count, int64_t wanted) {
  uint32_t begin = 0;
  while (count > 0) {
    const uint32_t step = (count + 31) / 32, at = ptx::lane_id() * step;
    const bool below = at < count && __ldg(tokens + begin + at) < wanted;
    const uint32_t probes = __popc(__ballot_sync(ptx::kAllLanes, below));
    if (probes == 0) break;
    const uint32_t passed = (probes - 1) * step + 1;
    begin += passed;
    count = min(step - 1, count - passed);
  }
  return begin;
}

// Sets the words of the span at token `start`. `beam` counts over the whole batch.
FK_DEVICE void allow(const Constraints& c, uint32_t* words, int64_t beam, int64_t start,
                     int64_t vocab) {
  const uint32_t lane = ptx::lane_id();
  const uint32_t size = static_cast<uint32_t>(min(kSpanChunks * kChunk, vocab - start));
  const auto bit = [](uint32_t element) { return 1u << element % 32; };
  __syncwarp();  // all lanes have taken the bits of the span before
#pragma unroll
  for (uint32_t w = lane; w < kMaskWords; w += 32) {
    const uint32_t inside = size > 32 * w ? min(size - 32 * w, 32u) : 0;
    words[w] = c.nodes != nullptr || inside == 0 ? 0 : ~0u >> (32 - inside);
  }
  __syncwarp();
  if (c.nodes != nullptr) {
    const Children all = children_of(c, beam);
    const uint32_t count = static_cast<uint32_t>(all.count);
    bool more = true;
    for (uint32_t i = lower_bound(all.tokens, count, start); more; i += 32) {
      const bool has = i + lane < count;
      const int64_t element = has ? __ldg(all.tokens + i + lane) - start : size;
      if (element >= 0 && element < size) {
        atomicOr(words + element / 32, bit(static_cast<uint32_t>(element)));
      }
      more = __all_sync(ptx::kAllLanes, element < size);
    }
    __syncwarp();  // the children's bits are set before some are cleared
  }
#pragma unroll 4
  for (int64_t i = lane; i < c.excluded_count; i += 32) {
    const int64_t element = __ldg(c.excluded + beam * c.excluded_count + i) - start;
    if (element >= 0 && element < size) {
      atomicAnd(words + element / 32, ~bit(static_cast<uint32_t>(element)));
    }
  }
  __syncwarp();
}

// This lane's elements of the chunk of these words: bit j E + i is element i of its vector j.
template <class T>
FK_DEVICE uint32_t allowed(const uint32_t* words) {
  uint32_t own = 0;
#pragma unroll
  for (int j = 0; j < kVectors<T>; ++j) {
    const uint32_t first = first_element<T>(j), part = words[first / 32] >> first % 32;
    own |= (part & ((1u << kPerVector<T>)-1)) << j * kPerVector<T>;
  }
  return own;
}

}  // namespace flashkern::beam::sm80
