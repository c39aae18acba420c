// One source, several instruction sets. Every csrc/*/cpu/*.cpp is compiled once for each ISA (for
// AMX: those that multiply tiles) with FK_ISA set to that ISA's name, puts its code into namespace
// flashkern::FK_ISA, and is reached through FK_CPU_KERNEL, which declares a kernel for each ISA and
// a function that calls the active one.
#pragma once

#include "threads.h"

namespace flashkern {

// kAvx512Bf16 is kAvx512 with its products of bfloat16 pairs (Zen 4, Cooper Lake and later),
// kAmxBf16 is that with AMX's products of tiles (Sapphire Rapids and later).
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };

// The best ISA that this library holds and this CPU runs, or the one that FLASHKERN_CPU_ISA names.
Isa active_isa();

// Forces an ISA by name ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"; "" goes back to
// the best one). Returns false where this build or this CPU lacks it.
bool set_isa(const char* name);

const char* isa_name(Isa isa);
int isa_lanes(Isa isa);  // floats in a vector

// What a plan wants to know of this CPU beyond its vectors.
struct CpuFacts {
  bool intel = false;
  bool bfloat16 = false;  // multiplies bfloat16: AVX512_BF16 or AMX
  bool half = false;      // multiplies float16: AVX512_FP16
};
CpuFacts cpu_facts();

}  // namespace flashkern

#ifdef FK_BUILD_AVX2
#define FK_IF_AVX2(...) __VA_ARGS__
#else
#define FK_IF_AVX2(...)
#endif
#ifdef FK_BUILD_AVX512
#define FK_IF_AVX512(...) __VA_ARGS__
#else
#define FK_IF_AVX512(...)
#endif
#ifdef FK_BUILD_AVX512_BF16
#define FK_IF_AVX512_BF16(...) __VA_ARGS__
#else
#define FK_IF_AVX512_BF16(...)
#endif
#ifdef FK_BUILD_AMX_BF16
#define FK_IF_AMX_BF16(...) __VA_ARGS__
#else
#define FK_IF_AMX_BF16(...)
#endif

#define FK_DECLARE(isa, name, Params)       \
  namespace isa {                           \
  void name(const Params&, const Threads&); \
  }

// `best` stands in front of the other cases.
#define FK_CPU_DISPATCH(name, Params, best)                                                 \
  FK_DECLARE(portable, name, Params)                                                        \
  FK_IF_AVX2(FK_DECLARE(avx2, name, Params))                                                \
  FK_IF_AVX512(FK_DECLARE(avx512, name, Params))                                            \
  FK_IF_AVX512_BF16(FK_DECLARE(avx512_bf16, name, Params))                                  \
  inline void name(const Params& p, const Threads& threads) {                               \
    switch (active_isa()) {                                                                 \
      best FK_IF_AVX512_BF16(case Isa::kAvx512Bf16 : return avx512_bf16::name(p, threads);) \
          FK_IF_AVX512(case Isa::kAvx512 : return avx512::name(p, threads);)                \
              FK_IF_AVX2(case Isa::kAvx2 : return avx2::name(p, threads);) default          \
          : return portable::name(p, threads);                                              \
    }                                                                                       \
  }

#define FK_CPU_KERNEL(name, Params) \
  FK_CPU_DISPATCH(name, Params, FK_IF_AMX_BF16(case Isa::kAmxBf16:))

// One that has an implementation of its own for tiles.
#define FK_TILE_KERNEL(name, Params)                 \
  FK_IF_AMX_BF16(FK_DECLARE(amx_bf16, name, Params)) \
  FK_CPU_DISPATCH(name, Params,                      \
                  FK_IF_AMX_BF16(case Isa::kAmxBf16 : return amx_bf16::name(p, threads);))
