// A switch at each fault that was put into a copy of a kernel: one library holds them all, and one
// at most is on. Number n is on where fk_fault is n; everything else computes what it did before.
//
// on(n) is asked only where the fault would make a difference: fk_fault = -1 notes who is asked, so
// that a fault need only be run in the tests that can see it.
//
// A binary operator becomes an infix call of the same precedence: a < b turns into
// a < less(n) < b, which is a <= b where the fault is on.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "ptx/global.h"

extern "C" {
extern const int fk_fault;  // const for the compiler alone: no kernel ever sees it change
bool fk_note(int fault);    // false
}

namespace flashkern::faults {

// Constant expressions stay as they are.
constexpr bool on(int fault) {
  if (std::is_constant_evaluated()) return false;
  return fk_fault < 0 ? fk_note(fault) : fk_fault == fault;
}

template <class T>
constexpr T choose(int fault, T right, T wrong) {
  return right == wrong || !on(fault) ? right : wrong;
}

// An integer constant, and the one before it.
constexpr int off_by_one(int fault, int value) { return on(fault) ? value - 1 : value; }

#define FK_INFIX(name, op, faulty)                       \
  struct name {                                          \
    int fault;                                           \
    constexpr explicit name(int n) : fault(n) {}         \
  };                                                     \
  template <class A>                                     \
  struct name##_half {                                   \
    A a;                                                 \
    int fault;                                           \
  };                                                     \
  template <class A>                                     \
  constexpr auto operator op(A a, name infix) {          \
    return name##_half<A>{a, infix.fault};               \
  }                                                      \
  template <class A, class B>                            \
  constexpr auto operator op(name##_half<A> left, B b) { \
    const A a = left.a;                                  \
    return choose<bool>(left.fault, a op b, a faulty b); \
  }
FK_INFIX(less, <, <=)
FK_INFIX(less_equal, <=, <)
FK_INFIX(greater, >, >=)
FK_INFIX(greater_equal, >=, >)
#undef FK_INFIX

// Functions with something left out, or a wrong lane: faults::min{n}(a, b) is a.
#define FK_FUNCTION(name, parameters, right, wrong) \
  struct name {                                     \
    int fault;                                      \
    template <class T>                              \
    constexpr T operator() parameters const {       \
      return choose<T>(fault, right, wrong);        \
    }                                               \
  };
FK_FUNCTION(min, (T a, T b), ::min(a, b), a)
FK_FUNCTION(max, (T a, T b), ::max(a, b), a)
FK_FUNCTION(fmaxf, (T a, T b), ::fmaxf(a, b), a)
FK_FUNCTION(fminf, (T a, T b), ::fminf(a, b), a)
#define FK_OWN(name) FK_FUNCTION(name, (unsigned mask, T x), ::name(mask, x), x)
FK_OWN(__any_sync)
FK_OWN(__all_sync)
FK_OWN(__reduce_max_sync)
FK_OWN(__reduce_min_sync)
FK_OWN(__reduce_add_sync)
#undef FK_OWN
#undef FK_FUNCTION

#define FK_SHUFFLE(name, other)                                        \
  struct name {                                                        \
    int fault;                                                         \
    template <class T>                                                 \
    T operator()(unsigned mask, T x, int lane, int width = 32) const { \
      return ::name(mask, x, on(fault) ? other : lane, width);         \
    }                                                                  \
  };
FK_SHUFFLE(__shfl_sync, lane + 1)
FK_SHUFFLE(__shfl_xor_sync, lane ^ 1)
FK_SHUFFLE(__shfl_up_sync, lane + 1)
FK_SHUFFLE(__shfl_down_sync, lane + 1)
#undef FK_SHUFFLE

// Order between threads and blocks, lost: the same arithmetic without the promise.
struct atomicAdd {
  int fault;
  template <class T>
  T operator()(T* p, std::type_identity_t<T> value) const {
    if (!on(fault)) return ::atomicAdd(p, value);
    const T old = *p;
    *p = old + value;
    return old;
  }
};
struct add_acquire_release {
  int fault;
  int operator()(int* p, int value) const {
    return on(fault) ? ::atomicAdd(p, value) : ptx::add_acquire_release(p, value);
  }
};
struct add_release {
  int fault;
  void operator()(int* p, int value) const {
    on(fault) ? void(::atomicAdd(p, value)) : ptx::add_release(p, value);
  }
};
struct load_acquire {
  int fault;
  int operator()(int* p) const { return on(fault) ? ::atomicAdd(p, 0) : ptx::load_acquire(p); }
};

}  // namespace flashkern::faults
