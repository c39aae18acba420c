#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <vector>

#include "emulator/sanitizer.h"

#if defined(__x86_64__) && !defined(FK_FIBER_UCONTEXT)
#define FK_FIBER_X86
// The System V ABI's callee-saved registers. `ret` finds the call site that it was suspended at,
// which is switch_fiber's for every fiber: the branch predictor is right nearly always.
extern "C" void fk_switch_context(void** save, void* load);
asm(R"(
  .text
  .p2align 4
  .globl fk_switch_context
  .hidden fk_switch_context
  .type fk_switch_context, @function
fk_switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size fk_switch_context, .-fk_switch_context
)");
#else
#include <ucontext.h>
#endif

namespace flashkern::emulator {
namespace {

#if defined(FK_EMULATOR_SANITIZED)
constexpr size_t kStackBytes = 512 << 10;  // sanitized frames are several times larger
#else
constexpr size_t kStackBytes = 256 << 10;
#endif
constexpr size_t kPage = 4096;
constexpr size_t kStacksPerSlab = 64;

constexpr size_t kSlabBytes = kStacksPerSlab * kStackBytes;

std::vector<char*> slabs;

// Stacks are mapped, not allocated: a page costs nothing until it is touched. A page without access
// below each turns an overflow into a fault at the right place.
char* pooled_stack(size_t index) {
  while (slabs.size() <= index / kStacksPerSlab) {
    void* slab = mmap(nullptr, kSlabBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (slab == MAP_FAILED) throw std::bad_alloc();
    for (size_t i = 0; i < kStacksPerSlab; ++i) {
      mprotect(static_cast<char*>(slab) + i * kStackBytes, kPage, PROT_NONE);
    }
    slabs.push_back(static_cast<char*>(slab));
  }
  return slabs[index / kStacksPerSlab] + (index % kStacksPerSlab) * kStackBytes;
}

}  // namespace

bool on_stack(const void* p) {
  for (const char* slab : slabs) {
    if (static_cast<size_t>(static_cast<const char*>(p) - slab) < kSlabBytes) return true;
  }
  return false;
}

void prepare(Fiber& fiber, size_t index, void (*entry)()) {
  char* low = pooled_stack(index);
  fiber.stack = low + kPage;
  fiber.stack_bytes = kStackBytes - kPage;
  fiber.fake_stack = nullptr;
  unpoison(fiber.stack, fiber.stack_bytes);
#ifdef FK_FIBER_X86
  // Equal depths of all stacks would share a few cache sets: start each at another line.
  const size_t colour = (index % 61) * 64;
  auto* top = reinterpret_cast<uintptr_t*>(low + kStackBytes - colour);
  *--top = 0;  // the entry's return address: it never returns
  *--top = reinterpret_cast<uintptr_t>(entry);
  top -= 6;  // what fk_switch_context pops
  for (int i = 0; i < 6; ++i) top[i] = 0;
  fiber.stack_pointer = top;
#else
  auto* context = new (low + kPage) ucontext_t;  // grows away from the stack's busy end
  getcontext(context);
  context->uc_stack.ss_sp = low + 2 * kPage;
  context->uc_stack.ss_size = kStackBytes - 2 * kPage;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  fiber.stack_pointer = context;
#endif
}

void switch_fiber(Fiber& from, Fiber& to, bool last) {
  if (from.stack == nullptr) leaving_caller();
  start_switch(last ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#ifdef FK_FIBER_X86
  fk_switch_context(&from.stack_pointer, to.stack_pointer);
#else
  static ucontext_t own;  // of the caller that drives the fibers
  if (from.stack == nullptr) from.stack_pointer = &own;
  swapcontext(static_cast<ucontext_t*>(from.stack_pointer),
              static_cast<ucontext_t*>(to.stack_pointer));
#endif
  finish_switch(from.fake_stack);
}

void fiber_started() { finish_switch(nullptr); }

}  // namespace flashkern::emulator
