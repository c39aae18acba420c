// Threads without torch: a kernel gets a way to run tasks in parallel and never asks where it comes
// from.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace flashkern {

// ThreadSanitizer sees none of the pool's own synchronisation (torch and OpenMP are not
// instrumented), so run() says what it rests on: what came before a parallel region is seen in it,
// and what was done in it is seen after.
#if defined(__SANITIZE_THREAD__)
inline void tsan_release(void* at) { __tsan_release(at); }
inline void tsan_acquire(void* at) { __tsan_acquire(at); }
#else
inline void tsan_release(void*) {}
inline void tsan_acquire(void*) {}
#endif

// `parallel(count, context, body)` must call body(context, t) once for every t in [0, count), in
// any order, possibly one after the other. csrc/torch/threads.h fills it from torch's own pool.
struct Threads {
  using Body = void (*)(void* context, int thread);

  int count = 1;
  void (*parallel)(int count, void* context, Body body) = nullptr;

  // Calls fn(task, thread) for every task in [0, tasks). Tasks are handed out one at a time in
  // ascending order, so put the longest first. A thread's number indexes per-thread scratch.
  template <class Fn>
  void run(int64_t tasks, Fn&& fn) const {
    const int workers = static_cast<int>(tasks < count ? tasks : count);
    if (workers <= 1) {
      for (int64_t task = 0; task < tasks; ++task) fn(task, 0);
      return;
    }
    struct Shared {
      std::atomic<int64_t> next{0};
      int64_t tasks;
      Fn* fn;
    } shared{{}, tasks, &fn};
    tsan_release(&shared);
    parallel(workers, &shared, [](void* context, int thread) {
      tsan_acquire(context);
      auto* s = static_cast<Shared*>(context);
      for (int64_t t; (t = s->next.fetch_add(1, std::memory_order_relaxed)) < s->tasks;) {
        (*s->fn)(t, thread);
      }
      tsan_release(context);
    });
    tsan_acquire(&shared);
  }
};

}  // namespace flashkern
