// What GCC calls at each load and store of code compiled with -fsanitize=thread. No libtsan: these
// are all the entry points that such code needs.
#include "emulator/race.h"

namespace {

using flashkern::emulator::machine;
namespace race = flashkern::emulator::race;

void seen(const void* p, size_t bytes, bool write, const void* pc) {
  if (machine.self == nullptr) return;
  const race::Access access{nullptr, {}, pc};
  write ? race::write(p, bytes, access) : race::read(p, bytes, access);
}

}  // namespace

#define FK_HOOK __attribute__((visibility("hidden"))) void
#define FK_HOOKS(n)                                                                             \
  FK_HOOK __tsan_read##n(void* p) { seen(p, n, false, __builtin_return_address(0)); }           \
  FK_HOOK __tsan_write##n(void* p) { seen(p, n, true, __builtin_return_address(0)); }           \
  FK_HOOK __tsan_unaligned_read##n(void* p) { seen(p, n, false, __builtin_return_address(0)); } \
  FK_HOOK __tsan_unaligned_write##n(void* p) { seen(p, n, true, __builtin_return_address(0)); } \
  FK_HOOK __tsan_volatile_read##n(void* p) { seen(p, n, false, __builtin_return_address(0)); }  \
  FK_HOOK __tsan_volatile_write##n(void* p) { seen(p, n, true, __builtin_return_address(0)); }  \
  FK_HOOK __tsan_unaligned_volatile_read##n(void* p) {                                          \
    seen(p, n, false, __builtin_return_address(0));                                             \
  }                                                                                             \
  FK_HOOK __tsan_unaligned_volatile_write##n(void* p) {                                         \
    seen(p, n, true, __builtin_return_address(0));                                              \
  }

// Host code beside the kernels may hold C++ atomics (the guard of a static local is one).
#define FK_ATOMIC(type, name, expression)                                              \
  __attribute__((visibility("hidden"))) type name(volatile type* p, type value, int) { \
    return __atomic_##expression(p, value, __ATOMIC_SEQ_CST);                          \
  }
#define FK_ATOMICS(bits, type)                                                                  \
  __attribute__((visibility("hidden"))) type __tsan_atomic##bits##_load(const volatile type* p, \
                                                                        int) {                  \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                \
  }                                                                                             \
  FK_HOOK __tsan_atomic##bits##_store(volatile type* p, type value, int) {                      \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                               \
  }                                                                                             \
  FK_ATOMIC(type, __tsan_atomic##bits##_exchange, exchange_n)                                   \
  FK_ATOMIC(type, __tsan_atomic##bits##_fetch_add, fetch_add)                                   \
  FK_ATOMIC(type, __tsan_atomic##bits##_fetch_sub, fetch_sub)                                   \
  __attribute__((visibility("hidden"))) int __tsan_atomic##bits##_compare_exchange_strong(      \
      volatile type* p, type* expected, type value, int, int) {                                 \
    return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_SEQ_CST,             \
                                       __ATOMIC_SEQ_CST);                                       \
  }

extern "C" {
FK_ATOMICS(8, uint8_t)
FK_ATOMICS(16, uint16_t)
FK_ATOMICS(32, uint32_t)
FK_ATOMICS(64, uint64_t)
FK_HOOKS(1)
FK_HOOKS(2)
FK_HOOKS(4)
FK_HOOKS(8)
FK_HOOKS(16)
FK_HOOK __tsan_read_range(void* p, size_t n) { seen(p, n, false, __builtin_return_address(0)); }
FK_HOOK __tsan_write_range(void* p, size_t n) { seen(p, n, true, __builtin_return_address(0)); }
FK_HOOK __tsan_func_entry(void*) {}
FK_HOOK __tsan_func_exit(void*) {}
FK_HOOK __tsan_vptr_update(void**, void*) {}
FK_HOOK __tsan_init() { race::active = true; }
}
