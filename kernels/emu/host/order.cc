// SPDX-License-Identifier: Apache-2.0
// Atomics, memory fences, and the order between kernels.
#include <cstring>
#include <unordered_map>
#include <utility>
#include "core.h"

namespace zsemu {

namespace {
// What releases to an address have published. A plain atomic adds what the thread's last __threadfence covered.
std::unordered_map<const void*, Gathered> published;

uint64_t load(const void* p, uint32_t size) {
  uint64_t v = 0;
  memcpy(&v, p, size);
  return v;
}
uint64_t sign(uint64_t v, uint32_t size) { return size == 4 ? uint64_t(int64_t(int32_t(v))) : v; }
}  // namespace

uint64_t atomic(Atomic op, Order order, void* p, uint32_t size, uint64_t a, uint64_t b) {
  ZS_ENTER();
  yield();
  bool reads = op != Atomic::store, writes = op != Atomic::load;
  checked(p, size, size, false, Access::atomic, "atomic");
  if (writes) checked(p, size, size, true, Access::atomic, "atomic");
  uint64_t old = load(p, size), now = old;
  switch (op) {
    case Atomic::add: now = old + a; break;
    case Atomic::inc: now = old >= a ? 0 : old + 1; break;
    case Atomic::min_u: now = a < old ? a : old; break;
    case Atomic::max_u: now = a > old ? a : old; break;
    case Atomic::min_s: now = int64_t(sign(a, size)) < int64_t(sign(old, size)) ? a : old; break;
    case Atomic::max_s: now = int64_t(sign(a, size)) > int64_t(sign(old, size)) ? a : old; break;
    case Atomic::and_: now = old & a; break;
    case Atomic::or_: now = old | a; break;
    case Atomic::xor_: now = old ^ a; break;
    case Atomic::exch:
    case Atomic::store: now = a; break;
    case Atomic::cas: now = old == a ? b : old; break;
    case Atomic::add_f32: {
      float x, y;
      memcpy(&x, &old, 4);
      memcpy(&y, &a, 4);
      x += y;
      now = 0;
      memcpy(&now, &x, 4);
      break;
    }
    case Atomic::load: break;
  }
  if (writes) memcpy(p, &now, size);
  if (g.opt.races) {
    Gathered& pub = published[p];
    if (reads && !pub.empty()) {
      if (order == Order::acquire || order == Order::acq_rel)
        acquire(cur, pub);
      else
        cur->acquire_pending.join(pub);
    }
    if (writes) {
      if (op == Atomic::store) pub.clear();
      if (order == Order::release || order == Order::acq_rel)
        release_into(pub, cur);
      else if (!cur->release_fence.empty())
        pub.join(cur->release_fence);
    }
  }
  if (writes && now != old) progress();
  // A thread that does nothing but read atomically is polling.
  if (op != Atomic::load)
    cur->polls = 0;
  else if (++cur->polls > 4)
    spin_yield();
  return old;
}

void load_relaxed(uint32_t* to, const void* p, uint32_t words) {
  if (uintptr_t(p) % (4 * words)) ZS_ENTER(), fault("alignment", "a relaxed load of %u words from %p", words, p);
  uint32_t order[4] = {0, 1, 2, 3};
  for (uint32_t i = words; i > 1; i--) std::swap(order[i - 1], order[rnd() % i]);
  for (uint32_t i = 0; i < words; i++) {
    to[order[i]] = uint32_t(atomic(Atomic::load, Order::relaxed, (uint32_t*)p + order[i], 4, 0, 0));
    ZS_ENTER();
  }
}

void store_relaxed(void* p, const uint32_t* from, uint32_t words) {
  if (uintptr_t(p) % (4 * words)) ZS_ENTER(), fault("alignment", "a relaxed store of %u words to %p", words, p);
  uint32_t order[4] = {0, 1, 2, 3};
  for (uint32_t i = words; i > 1; i--) std::swap(order[i - 1], order[rnd() % i]);
  for (uint32_t i = 0; i < words; i++) {
    atomic(Atomic::store, Order::relaxed, (uint32_t*)p + order[i], 4, from[order[i]], 0);
    ZS_ENTER();
  }
}

void thread_fence() {
  ZS_ENTER();
  if (g.opt.races) {
    acquire(cur, cur->acquire_pending);
    cur->acquire_pending.clear();
    cur->release_fence.clear();
    release_into(cur->release_fence, cur);
  }
  yield();
}

void fence_proxy_async() {
  ZS_ENTER();
  fence_own_mbarriers();
  if (g.opt.races) note_proxy_fence(cur);
}

void fence_proxy_async_global() {
  ZS_ENTER();
  cur->global_fence = cur->view;
  cur->global_fence_clock = cur->clock++;
}

void griddep_wait() {
  ZS_ENTER();
  if (g.opt.races) acquire(cur, previous_grid());
  yield();
}

void griddep_launch() {
  ZS_ENTER();
  yield();
}

void sleep() {
  ZS_ENTER();
  spin_yield();
}

void trap(const char* what) {
  ZS_ENTER();
  fault("trap", "%s", what);
}

}  // namespace zsemu
