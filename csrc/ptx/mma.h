// mma.sync: D += A B for a 16 x K by K x 8 product of one warp, float32 sums.
//
//   BFloat16, Half    K = 16      Tf32    K = 8
//
// With g = lane / 4, t = lane % 4, a lane holds (T a pair of 16-bit elements along k, or one TF32):
//   a[0] (g, 2t)  a[1] (g + 8, 2t)  a[2] (g, 2t + 8)  a[3] (g + 8, 2t + 8)     TF32: t, t + 4
//   b[0] (2t, g)  b[1] (2t + 8, g)                                             TF32: t, t + 4
//   d[0] (g, 2t)  d[1] (g, 2t + 1)  d[2] (g + 8, 2t)  d[3] (g + 8, 2t + 1)
#pragma once

#include "ptx/convert.h"
#include "ptx/core.h"

namespace flashkern::ptx {

template <class T>
FK_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define FK_MMA(T, shape)                                                                 \
  template <>                                                                            \
  FK_DEVICE void mma<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned." shape                                               \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"      \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));    \
  }
FK_MMA(BFloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FK_MMA(Half, "m16n8k16.row.col.f32.f16.f16.f32")
FK_MMA(Tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FK_MMA

// N products that share A: a 16 x 8 N strip of D. One meeting of the warp in the emulator, so
// write this rather than a loop.
template <class T, int N>
FK_DEVICE void mma_strip(float (&d)[N][4], const uint32_t (&a)[4], const uint32_t (&b)[N][2]) {
#pragma unroll
  for (int i = 0; i < N; ++i) mma<T>(d[i], a, b[i]);
}

}  // namespace flashkern::ptx
