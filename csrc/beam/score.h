// The arithmetic and the order that all back ends share. Given the same (shift, log_sum), every
// back end gives the same bits and therefore the same choice:
//
//   score = ((logit - shift) - log_sum) + beam_score      float32, one rounding for each operation
//
// shift is the beam's greatest logit and log_sum = log(sum exp(logit - shift)), so that nothing
// large is rounded: logits near 1e4 keep scores good to 1e-6. With a logsumexp given by the caller,
// shift is that and log_sum is 0. A logit of -inf scores -inf whatever stands beside it. Each
// operation is monotone, so the best score of a set of logits is the score of its greatest logit:
// what the selection rests on.
//
// Order: NaN first (as torch.topk has it), then by score, +0 and -0 alike, then the smaller beam,
// then the smaller token. A candidate is one 64-bit number, greater is better: the ordered score
// above the complement of the flat index beam * vocab + token, which is therefore kept below 2^32.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#ifndef FK_HOST_DEVICE
#ifdef __CUDACC__
#define FK_HOST_DEVICE __host__ __device__
#else
#define FK_HOST_DEVICE
#endif
#endif

namespace flashkern::beam {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Normaliser {
  float shift = 0.f, log_sum = 0.f, beam_score = 0.f;
};

// F: float, or a vector of floats.
template <class F>
FK_HOST_DEVICE inline F score(F logit, F shift, F log_sum, F beam_score) {
  return ((logit - shift) - log_sum) + beam_score;
}

FK_HOST_DEVICE inline float score(float logit, const Normaliser& n) {
  if (logit == -kInfinity) return logit;
  return score(logit, n.shift, n.log_sum, n.beam_score);
}

// An unsigned number that orders scores; 0xffffffff for every NaN.
FK_HOST_DEVICE inline uint32_t ordered(float score) {
  if (score != score) return 0xffffffffu;
  const float positive_zero = score + 0.f;
  uint32_t bits;
  std::memcpy(&bits, &positive_zero, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

FK_HOST_DEVICE inline float score_of(uint32_t ordered) {
  if (ordered == 0xffffffffu) return kNaN;
  const uint32_t bits = ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered;
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

using Candidate = uint64_t;

FK_HOST_DEVICE inline Candidate candidate(uint32_t ordered, uint32_t flat_index) {
  return static_cast<Candidate>(ordered) << 32 | ~flat_index;
}
// Below every candidate: what stands where no more are left (2^32 - 1 is no flat index).
inline constexpr Candidate kNobody = 0;
FK_HOST_DEVICE inline uint32_t ordered_of(Candidate c) { return static_cast<uint32_t>(c >> 32); }
FK_HOST_DEVICE inline uint32_t index_of(Candidate c) { return ~static_cast<uint32_t>(c); }

}  // namespace flashkern::beam
