// Atomics. One thread runs at a time, so plain arithmetic is atomic; the race detector is told.
#pragma once

#include <type_traits>

#include "emulator/api.h"

namespace flashkern::emulator {

// A hook at each access would make these races.
#define FK_UNWATCHED __attribute__((no_sanitize("thread"))) inline

template <class T, class F>
FK_UNWATCHED T atomic_update(T* p, F&& update, const Site& site) {
  on_atomic(p, sizeof(T), site);
  const T old = *p;
  *p = update(old);
  return old;
}

}  // namespace flashkern::emulator

#define FK_ATOMIC(name, expression)                                                              \
  template <class T>                                                                             \
  FK_UNWATCHED T name(T* p, std::type_identity_t<T> value,                                       \
                      flashkern::emulator::Site site = flashkern::emulator::Site::current()) {   \
    return flashkern::emulator::atomic_update(                                                   \
        p, [&](T old) __attribute__((no_sanitize("thread"))) -> T { return expression; }, site); \
  }

FK_ATOMIC(atomicAdd, static_cast<T>(old + value))
FK_ATOMIC(atomicSub, static_cast<T>(old - value))
FK_ATOMIC(atomicExch, (static_cast<void>(old), value))
FK_ATOMIC(atomicMin, value < old ? value : old)
FK_ATOMIC(atomicMax, old < value ? value : old)
FK_ATOMIC(atomicAnd, old& value)
FK_ATOMIC(atomicOr, old | value)
FK_ATOMIC(atomicXor, old ^ value)
FK_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
FK_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef FK_ATOMIC

template <class T>
FK_UNWATCHED T atomicCAS(T* p, std::type_identity_t<T> compare, std::type_identity_t<T> value,
                         flashkern::emulator::Site site = flashkern::emulator::Site::current()) {
  flashkern::emulator::on_atomic(p, sizeof(T), site);
  const T old = *p;
  if (old == compare) *p = value;
  return old;
}
