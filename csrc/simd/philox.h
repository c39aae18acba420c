// The random words of a run of columns, four for each counter (column / 4): word column % 4.
#pragma once

#include "dropout.h"
#include "simd/vec.h"

namespace flashkern::FK_ISA {

struct Product {
  VecU high, low;
};

inline Product multiply_wide(uint32_t m, VecU c) {
#if defined(__AVX512F__)
  const __m512i x = reinterpret_cast<__m512i>(c), k = _mm512_set1_epi32(static_cast<int>(m));
  const __m512i even = _mm512_mul_epu32(x, k);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), k);
  return {reinterpret_cast<VecU>(_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd)),
          reinterpret_cast<VecU>(_mm512_mullo_epi32(x, k))};
#elif defined(__AVX2__)
  const __m256i x = reinterpret_cast<__m256i>(c), k = _mm256_set1_epi32(static_cast<int>(m));
  const __m256i even = _mm256_mul_epu32(x, k);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), k);
  return {reinterpret_cast<VecU>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa)),
          reinterpret_cast<VecU>(_mm256_mullo_epi32(x, k))};
#else
  using VecU64 = uint64_t __attribute__((vector_size(kLanes * 8)));
  const VecU64 product = __builtin_convertvector(c, VecU64) * m;
  return {__builtin_convertvector(product >> 32, VecU), __builtin_convertvector(product, VecU)};
#endif
}

struct PhiloxWords {
  VecU word[4];
};

// The four words of each lane's own counter.
inline PhiloxWords philox_words(uint64_t key, VecU x0, VecU x1, VecU x2, VecU x3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const Product p0 = multiply_wide(kPhiloxM0, x0), p1 = multiply_wide(kPhiloxM1, x2);
    x0 = p1.high ^ x1 ^ k0;
    x2 = p0.high ^ x3 ^ k1;
    x1 = p1.low;
    x3 = p0.low;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{x0, x1, x2, x3}};
}

// Words of columns [4 q, 4 (q + kLanes)) into out[4 * kLanes], in column order.
inline void philox_block(uint64_t key, uint32_t q, uint32_t c1, uint32_t c2, uint32_t c3,
                         uint32_t* out) {
  VecU quads;
  for (int i = 0; i < kLanes; ++i) quads[i] = q + i;
  const PhiloxWords x = philox_words(key, quads, VecU{} + c1, VecU{} + c2, VecU{} + c3);
  for (int i = 0; i < kLanes; ++i) {
    for (int w = 0; w < 4; ++w) out[4 * i + w] = x.word[w][i];
  }
}

// Words of columns [begin, begin + n), begin a multiple of 4; `out` has room for n rounded up to a
// multiple of 4 * kLanes.
inline void philox_row(uint64_t key, int64_t begin, int64_t n, uint32_t c1, uint32_t c2,
                       uint32_t c3, uint32_t* out) {
  for (int64_t j = 0; j < n; j += 4 * kLanes) {
    philox_block(key, static_cast<uint32_t>((begin + j) / 4), c1, c2, c3, out + j);
  }
}

}  // namespace flashkern::FK_ISA
