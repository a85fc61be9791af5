// SPDX-License-Identifier: Apache-2.0
#include "fiber.h"
#include <sys/mman.h>
#include <cstdio>
#include <cstdlib>
#include <vector>

#if !defined(__x86_64__) || defined(ZS_EMU_UCONTEXT)
#include <ucontext.h>
#endif

namespace zsemu {

static std::vector<uint8_t*> pool;

uint8_t* take_stack() {
  constexpr size_t guard = 4096;
  if (pool.empty()) {
    constexpr size_t batch = 32;
    auto* m = (uint8_t*)mmap(nullptr, batch * (kStack + guard), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED) {
      fprintf(stderr, "fault: setup\ntext: no memory for the stacks of the emulated threads\n");
      exit(2);
    }
    for (size_t i = 0; i < batch; i++) {
      uint8_t* s = m + i * (kStack + guard);
      mprotect(s, guard, PROT_NONE);
      pool.push_back(s + guard);
    }
  }
  uint8_t* s = pool.back();
  pool.pop_back();
  return s;
}

void return_stack(uint8_t* stack) { pool.push_back(stack); }

#if defined(__x86_64__) && !defined(ZS_EMU_UCONTEXT)
// Saves what the System V calling convention asks a callee to keep. (ucontext makes a system call for each switch.)
asm(R"(
.text
.type zsemu_switch, @function
zsemu_switch:
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
.size zsemu_switch, .-zsemu_switch
)");
extern "C" void zsemu_switch(void** save, void* to) asm("zsemu_switch");

void* prepare_stack(uint8_t* stack, void (*entry)()) {
  auto* top = (void**)(stack + kStack);
  *--top = nullptr;                 // a return address for entry, which never returns; also aligns
  *--top = (void*)entry;
  for (int i = 0; i < 6; i++) *--top = nullptr;
  return top;
}
void switch_stack(void** save, void* to) { zsemu_switch(save, to); }

#else
void* prepare_stack(uint8_t* stack, void (*entry)()) {
  auto* c = (ucontext_t*)stack;     // lives at the bottom of its own stack
  getcontext(c);
  c->uc_stack.ss_sp = stack + sizeof(ucontext_t);
  c->uc_stack.ss_size = kStack - sizeof(ucontext_t);
  c->uc_link = nullptr;
  makecontext(c, entry, 0);
  return c;
}
void switch_stack(void** save, void* to) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, (ucontext_t*)to);
}
#endif

}  // namespace zsemu
