// Philox4x32-10: a random number as a function of (key, counter), so that a dropout mask is never
// stored. One scalar definition for every back end; csrc/simd/philox.h has the vector form.
// Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
#pragma once

#include <cmath>
#include <cstdint>

#include "types.h"

namespace flashkern {

struct Philox4 {
  uint32_t word[4];
};

inline constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
inline constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

FK_HOST_DEVICE inline Philox4 philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2,
                                     uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// A value is kept when its random word is at least this; p = 1 keeps nothing (the word is 32 bits).
FK_HOST_DEVICE inline uint64_t dropout_threshold(double p) {
  return static_cast<uint64_t>(std::nearbyint(p * 4294967296.0));
}

}  // namespace flashkern
