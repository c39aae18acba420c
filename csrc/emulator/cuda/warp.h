// A warp's shuffles, votes, matches and reductions, and the block's plain barriers.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "emulator/api.h"

namespace flashkern::emulator {

// What a lane brings to a shuffle and takes from it. `from`: the lane that it reads, itself where
// the source lies outside its segment.
template <class T>
struct Shuffle {
  T value, result;
  int from;
};

template <class T>
void complete_shuffle(uint32_t mask, void* const* lanes) {
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    auto* own = static_cast<Shuffle<T>*>(lanes[std::countr_zero(left)]);
    if ((mask >> own->from & 1) == 0) {
      throw Error("emulator: lane " + std::to_string(std::countr_zero(left)) +
                  " shuffles from lane " + std::to_string(own->from) +
                  ", which the mask does not name");
    }
    own->result = static_cast<Shuffle<T>*>(lanes[own->from])->value;
  }
}

template <class T>
T shuffle(const char* name, uint32_t mask, T value, int from, bool in_range, const Site& site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle takes 4 or 8 bytes");
  Shuffle<T> own{value, value, in_range ? from : static_cast<int>(lane())};
  gather(name, Collective::kMasked, mask, &own, complete_shuffle<T>, site);
  return own.result;
}

// A collective whose result is a function of all lanes' values, the same for all of them.
template <class T, class R, class Combine>
struct Reduction {
  T value;
  R result;

  static void complete(uint32_t mask, void* const* lanes) {
    T values[32] = {};
    for (uint32_t left = mask; left != 0; left &= left - 1) {
      const int i = std::countr_zero(left);
      values[i] = static_cast<Reduction*>(lanes[i])->value;
    }
    const R result = Combine{}(mask, values);
    for (uint32_t left = mask; left != 0; left &= left - 1) {
      static_cast<Reduction*>(lanes[std::countr_zero(left)])->result = result;
    }
  }

  static R run(const char* name, uint32_t mask, T value, const Site& site) {
    Reduction own{value, {}};
    gather(name, Collective::kMasked, mask, &own, complete, site);
    return own.result;
  }
};

struct Ballot {
  uint32_t operator()(uint32_t mask, const uint32_t* values) const {
    uint32_t votes = 0;
    for (int i = 0; i < 32; ++i) {
      votes |= static_cast<uint32_t>((mask >> i & 1) && values[i]) << i;
    }
    return votes;
  }
};

template <class T, class F>
T fold(uint32_t mask, const T* values, F combine) {
  T result = values[std::countr_zero(mask)];
  for (uint32_t left = mask & (mask - 1); left != 0; left &= left - 1) {
    result = combine(result, values[std::countr_zero(left)]);
  }
  return result;
}

}  // namespace flashkern::emulator

#define FK_SITE flashkern::emulator::Site site = flashkern::emulator::Site::current()

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, FK_SITE) {
  const int base = static_cast<int>(flashkern::emulator::lane()) & ~(width - 1);
  return flashkern::emulator::shuffle("__shfl_sync", mask, value, base + (source & (width - 1)),
                                      true, site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, FK_SITE) {
  const int own = static_cast<int>(flashkern::emulator::lane()), from = own ^ lanes;
  return flashkern::emulator::shuffle("__shfl_xor_sync", mask, value, from,
                                      from <= (own | (width - 1)), site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, FK_SITE) {
  const int own = static_cast<int>(flashkern::emulator::lane()),
            from = own - static_cast<int>(delta);
  return flashkern::emulator::shuffle("__shfl_up_sync", mask, value, from,
                                      from >= (own & ~(width - 1)), site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, FK_SITE) {
  const int own = static_cast<int>(flashkern::emulator::lane()),
            from = own + static_cast<int>(delta);
  return flashkern::emulator::shuffle("__shfl_down_sync", mask, value, from,
                                      from <= (own | (width - 1)), site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, FK_SITE) {
  using namespace flashkern::emulator;
  return Reduction<uint32_t, uint32_t, Ballot>::run("__ballot_sync", mask, predicate != 0, site);
}

inline int __any_sync(unsigned mask, int predicate, FK_SITE) {
  using namespace flashkern::emulator;
  return Reduction<uint32_t, uint32_t, Ballot>::run("__any_sync", mask, predicate != 0, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate, FK_SITE) {
  using namespace flashkern::emulator;
  return Reduction<uint32_t, uint32_t, Ballot>::run("__all_sync", mask, predicate != 0, site) ==
         mask;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value, FK_SITE) {
  unsigned equal = 0;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    const T other = flashkern::emulator::shuffle("__match_any_sync", mask, value, i, true, site);
    equal |= static_cast<unsigned>(other == value) << i;
  }
  return equal;
}

#define FK_REDUCE(name, expression)                                           \
  template <class T>                                                          \
  T name(unsigned mask, T value, FK_SITE) {                                   \
    using namespace flashkern::emulator;                                      \
    const auto combine = [](uint32_t lanes, const T* values) -> T {           \
      return fold(lanes, values, [](T a, T b) -> T { return expression; });   \
    };                                                                        \
    return Reduction<T, T, decltype(combine)>::run(#name, mask, value, site); \
  }
FK_REDUCE(__reduce_add_sync, static_cast<T>(a + b))
FK_REDUCE(__reduce_min_sync, b < a ? b : a)
FK_REDUCE(__reduce_max_sync, a < b ? b : a)
FK_REDUCE(__reduce_and_sync, a& b)
FK_REDUCE(__reduce_or_sync, a | b)
FK_REDUCE(__reduce_xor_sync, a ^ b)
#undef FK_REDUCE

inline void __syncwarp(unsigned mask = 0xffffffffu, FK_SITE) {
  using namespace flashkern::emulator;
  gather("__syncwarp", Collective::kConverge, mask, nullptr, nullptr, site);
}

inline void __syncthreads(FK_SITE) {
  using namespace flashkern::emulator;
  block_barrier("__syncthreads", 0, 0, Vote::kNone, 0, site);
}
inline int __syncthreads_count(int predicate, FK_SITE) {
  using namespace flashkern::emulator;
  return block_barrier("__syncthreads_count", 0, 0, Vote::kCount, predicate, site);
}
inline int __syncthreads_and(int predicate, FK_SITE) {
  using namespace flashkern::emulator;
  return block_barrier("__syncthreads_and", 0, 0, Vote::kAnd, predicate, site);
}
inline int __syncthreads_or(int predicate, FK_SITE) {
  using namespace flashkern::emulator;
  return block_barrier("__syncthreads_or", 0, 0, Vote::kOr, predicate, site);
}
