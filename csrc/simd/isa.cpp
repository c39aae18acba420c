#include "simd/isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace flashkern {
namespace {

#ifdef FK_BUILD_AMX_BF16
// The tiles are 8 KiB that Linux keeps for a thread only where the process has asked for them.
bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool tile = edx >> 24 & 1, bfloat16 = edx >> 22 & 1;
  return tile && bfloat16 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool runs_here(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return true;
#ifdef FK_BUILD_AVX2
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
#endif
#ifdef FK_BUILD_AVX512
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#ifdef FK_BUILD_AVX512_BF16
    case Isa::kAvx512Bf16:
      return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
#endif
#ifdef FK_BUILD_AMX_BF16
    case Isa::kAmxBf16: {
      static const bool runs = runs_here(Isa::kAvx512Bf16) && may_use_tiles();
      return runs;
    }
#endif
    default:
      return false;
  }
}

Isa best_isa() {
  for (Isa isa : {Isa::kAmxBf16, Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2}) {
    if (runs_here(isa)) return isa;
  }
  return Isa::kPortable;
}

bool find_isa(const char* name, Isa* found) {
  for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmxBf16}) {
    if (std::strcmp(name, isa_name(isa)) == 0 && runs_here(isa)) {
      *found = isa;
      return true;
    }
  }
  return false;
}

Isa initial_isa() {
  const char* name = std::getenv("FLASHKERN_CPU_ISA");
  if (name == nullptr || *name == '\0') return best_isa();
  Isa isa = Isa::kPortable;
  if (!find_isa(name, &isa)) {
    std::fprintf(stderr, "flashkern: FLASHKERN_CPU_ISA must be an ISA that this CPU runs, got %s\n",
                 name);
    std::abort();
  }
  return isa;
}

// Atomic: one thread may choose while another runs a kernel. A call that is under way keeps the ISA
// that it started with.
std::atomic<Isa>& current() {
  static std::atomic<Isa> isa = initial_isa();
  return isa;
}

}  // namespace

Isa active_isa() { return current().load(std::memory_order_relaxed); }

bool set_isa(const char* name) {
  Isa isa = best_isa();
  if (*name != '\0' && !find_isa(name, &isa)) return false;
  current().store(isa, std::memory_order_relaxed);
  return true;
}

const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"};
  return kNames[static_cast<int>(isa)];
}

int isa_lanes(Isa isa) {
  constexpr int kLanes[] = {4, 8, 16, 16, 16};
  return kLanes[static_cast<int>(isa)];
}

namespace {

CpuFacts ask_cpu() {
  CpuFacts facts;
#if defined(__x86_64__)
  facts.intel = __builtin_cpu_is("intel");
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
    facts.half = edx >> 23 & 1;
    facts.bfloat16 = edx >> 22 & 1;  // AMX
  }
  if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) facts.bfloat16 |= eax >> 5 & 1;
#endif
  return facts;
}

}  // namespace

// Asked once: in a virtual machine cpuid costs microseconds.
CpuFacts cpu_facts() {
  static const CpuFacts facts = ask_cpu();
  return facts;
}

}  // namespace flashkern
