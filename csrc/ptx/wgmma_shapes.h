// The text of wgmma for each N: what wgmma.h declares. An asm statement must name every register of
// its accumulator, so the lists below spell them out, eight at a time.
#pragma once

#include <type_traits>

#include "ptx/wgmma.h"

// clang-format off
#define FK_D0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FK_D1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define FK_D2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define FK_D3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define FK_D4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define FK_D5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define FK_D6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define FK_D7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define FK_D8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define FK_D9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define FK_D10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define FK_D11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define FK_D12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define FK_D13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define FK_D14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define FK_D15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define FK_REGISTERS(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                        "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])

#define FK_TEXT_8 "%0, %1, %2, %3"
#define FK_TEXT_16 FK_D0
#define FK_TEXT_32 FK_TEXT_16 ", " FK_D1
#define FK_TEXT_48 FK_TEXT_32 ", " FK_D2
#define FK_TEXT_64 FK_TEXT_48 ", " FK_D3
#define FK_TEXT_80 FK_TEXT_64 ", " FK_D4
#define FK_TEXT_96 FK_TEXT_80 ", " FK_D5
#define FK_TEXT_112 FK_TEXT_96 ", " FK_D6
#define FK_TEXT_128 FK_TEXT_112 ", " FK_D7
#define FK_TEXT_144 FK_TEXT_128 ", " FK_D8
#define FK_TEXT_160 FK_TEXT_144 ", " FK_D9
#define FK_TEXT_176 FK_TEXT_160 ", " FK_D10
#define FK_TEXT_192 FK_TEXT_176 ", " FK_D11
#define FK_TEXT_208 FK_TEXT_192 ", " FK_D12
#define FK_TEXT_224 FK_TEXT_208 ", " FK_D13
#define FK_TEXT_240 FK_TEXT_224 ", " FK_D14
#define FK_TEXT_256 FK_TEXT_240 ", " FK_D15

#define FK_OUT_8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define FK_OUT_16 FK_REGISTERS(0)
#define FK_OUT_32 FK_OUT_16, FK_REGISTERS(8)
#define FK_OUT_48 FK_OUT_32, FK_REGISTERS(16)
#define FK_OUT_64 FK_OUT_48, FK_REGISTERS(24)
#define FK_OUT_80 FK_OUT_64, FK_REGISTERS(32)
#define FK_OUT_96 FK_OUT_80, FK_REGISTERS(40)
#define FK_OUT_112 FK_OUT_96, FK_REGISTERS(48)
#define FK_OUT_128 FK_OUT_112, FK_REGISTERS(56)
#define FK_OUT_144 FK_OUT_128, FK_REGISTERS(64)
#define FK_OUT_160 FK_OUT_144, FK_REGISTERS(72)
#define FK_OUT_176 FK_OUT_160, FK_REGISTERS(80)
#define FK_OUT_192 FK_OUT_176, FK_REGISTERS(88)
#define FK_OUT_208 FK_OUT_192, FK_REGISTERS(96)
#define FK_OUT_224 FK_OUT_208, FK_REGISTERS(104)
#define FK_OUT_240 FK_OUT_224, FK_REGISTERS(112)
#define FK_OUT_256 FK_OUT_240, FK_REGISTERS(120)

// The numbers of the operands after the accumulator.
#define FK_AFTER_8 "%4", "%5", "%6", "%7", "%8", "%9", "%10", "%11"
#define FK_AFTER_16 "%8", "%9", "%10", "%11", "%12", "%13", "%14", "%15"
#define FK_AFTER_32 "%16", "%17", "%18", "%19", "%20", "%21", "%22", "%23"
#define FK_AFTER_48 "%24", "%25", "%26", "%27", "%28", "%29", "%30", "%31"
#define FK_AFTER_64 "%32", "%33", "%34", "%35", "%36", "%37", "%38", "%39"
#define FK_AFTER_80 "%40", "%41", "%42", "%43", "%44", "%45", "%46", "%47"
#define FK_AFTER_96 "%48", "%49", "%50", "%51", "%52", "%53", "%54", "%55"
#define FK_AFTER_112 "%56", "%57", "%58", "%59", "%60", "%61", "%62", "%63"
#define FK_AFTER_128 "%64", "%65", "%66", "%67", "%68", "%69", "%70", "%71"
#define FK_AFTER_144 "%72", "%73", "%74", "%75", "%76", "%77", "%78", "%79"
#define FK_AFTER_160 "%80", "%81", "%82", "%83", "%84", "%85", "%86", "%87"
#define FK_AFTER_176 "%88", "%89", "%90", "%91", "%92", "%93", "%94", "%95"
#define FK_AFTER_192 "%96", "%97", "%98", "%99", "%100", "%101", "%102", "%103"
#define FK_AFTER_208 "%104", "%105", "%106", "%107", "%108", "%109", "%110", "%111"
#define FK_AFTER_224 "%112", "%113", "%114", "%115", "%116", "%117", "%118", "%119"
#define FK_AFTER_240 "%120", "%121", "%122", "%123", "%124", "%125", "%126", "%127"
#define FK_AFTER_256 "%128", "%129", "%130", "%131", "%132", "%133", "%134", "%135"
// clang-format on

#define FK_WGMMA_HEAD(n, type, P)       \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " P \
  ", 0;\n"                              \
  "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" FK_TEXT_##n "}, "

// A from shared memory: descriptors, then keep, then the two majors.
#define FK_WGMMA_SS(n, type) FK_WGMMA_SS_(n, type, FK_AFTER_##n)
#define FK_WGMMA_SS_(...) FK_WGMMA_SS__(__VA_ARGS__)
#define FK_WGMMA_SS__(n, type, A, B, P, TA, TB, x, y, z)                                 \
  asm volatile(FK_WGMMA_HEAD(n, type, P) A ", " B ", p, 1, 1, " TA ", " TB ";\n}"        \
               : FK_OUT_##n                                                              \
               : "l"(a), "l"(b), "r"(static_cast<int>(keep)), "n"(static_cast<int>(kA)), \
                 "n"(static_cast<int>(kB)))

// A from registers.
#define FK_WGMMA_RS(n, type) FK_WGMMA_RS_(n, type, FK_AFTER_##n)
#define FK_WGMMA_RS_(...) FK_WGMMA_RS__(__VA_ARGS__)
#define FK_WGMMA_RS__(n, type, A0, A1, A2, A3, B, P, TB, z)                                       \
  asm volatile(FK_WGMMA_HEAD(n, type, P) "{" A0 ", " A1 ", " A2 ", " A3 "}, " B ", p, 1, 1, " TB  \
                                         ";\n}"                                                   \
               : FK_OUT_##n                                                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(keep)), \
                 "n"(static_cast<int>(kB)))

#define FK_WGMMA_SHAPE(n, WGMMA)                 \
  if constexpr (R == n / 2) {                    \
    if constexpr (std::is_same_v<T, BFloat16>) { \
      WGMMA(n, "bf16");                          \
    } else {                                     \
      WGMMA(n, "f16");                           \
    }                                            \
  }

// clang-format off
#define FK_WGMMA_SHAPES(WGMMA)                                                              \
  static_assert(R == 4 || (R % 8 == 0 && R <= 128), "N: 8, or a multiple of 16 up to 256"); \
  FK_WGMMA_SHAPE(8, WGMMA) FK_WGMMA_SHAPE(16, WGMMA) FK_WGMMA_SHAPE(32, WGMMA)              \
  FK_WGMMA_SHAPE(48, WGMMA) FK_WGMMA_SHAPE(64, WGMMA) FK_WGMMA_SHAPE(80, WGMMA)             \
  FK_WGMMA_SHAPE(96, WGMMA) FK_WGMMA_SHAPE(112, WGMMA) FK_WGMMA_SHAPE(128, WGMMA)           \
  FK_WGMMA_SHAPE(144, WGMMA) FK_WGMMA_SHAPE(160, WGMMA) FK_WGMMA_SHAPE(176, WGMMA)          \
  FK_WGMMA_SHAPE(192, WGMMA) FK_WGMMA_SHAPE(208, WGMMA) FK_WGMMA_SHAPE(224, WGMMA)          \
  FK_WGMMA_SHAPE(240, WGMMA) FK_WGMMA_SHAPE(256, WGMMA)
// clang-format on

namespace flashkern::ptx {

template <class T, Major kA, Major kB, int R>
FK_DEVICE void wgmma(float (&d)[R], uint64_t a, uint64_t b, bool keep) {
  FK_WGMMA_SHAPES(FK_WGMMA_SS)
}

template <class T, Major kB, int R>
FK_DEVICE void wgmma(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool keep) {
  FK_WGMMA_SHAPES(FK_WGMMA_RS)
}

}  // namespace flashkern::ptx

#undef FK_WGMMA_SHAPES
#undef FK_WGMMA_SHAPE
