// SPDX-License-Identifier: Apache-2.0
// Checked memory. Kernels are compiled with -fsanitize=thread, so the compiler calls the __tsan_* hooks below before every load and
// store that it cannot prove private; these are this file's own and know what CUDA allows.
#include <sys/mman.h>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include "core.h"
#include "fiber.h"

namespace zsemu {

void maybe_preempt();

namespace {
std::vector<Region*> regions;
struct Reader {
  uint16_t gid;
  bool plain;   // not by the async proxy
  uint32_t clock, pc, warp;
};
std::vector<std::vector<Reader>> read_sets(1);
std::vector<uint32_t> free_sets;
constexpr size_t kMaxReaders = 24;

uint32_t warp_of(uint32_t gid) { return is_engine(gid) ? 1u << 20 | gid : slot_of(gid) * 64 + place_in_slot(gid) / 32; }

// Of a warp's reads of one kind the last is remembered.
void add_reader(Cell& c, const Reader& reader) {
  if (c.rgid == kNobody || (!(c.flags & kPlainRead) == !reader.plain && (c.rgid == reader.gid || warp_of(c.rgid) == reader.warp))) {
    c.rgid = reader.gid;
    c.rclk = reader.clock;
    c.rpc = reader.pc;
    c.flags = uint8_t(reader.plain ? c.flags | kPlainRead : c.flags & ~kPlainRead);
    return;
  }
  if (!c.more) {
    if (free_sets.empty()) {
      c.more = uint32_t(read_sets.size());
      read_sets.emplace_back();
    } else {
      c.more = free_sets.back();
      free_sets.pop_back();
    }
  }
  auto& set = read_sets[c.more];
  for (Reader& r : set)
    if (r.warp == reader.warp && r.plain == reader.plain) {
      r = reader;
      return;
    }
  if (set.size() < kMaxReaders) set.push_back(reader);
}

void drop_readers(Cell& c) {
  c.rgid = kNobody;
  if (c.more) {
    read_sets[c.more].clear();
    free_sets.push_back(c.more);
    c.more = 0;
  }
}

std::string at(const Region& r, size_t off, size_t n) { return format("%zu bytes at %s+%zu (of %zu)", n, r.name.c_str(), off, r.size); }

void check_state(const Actor& who, const Region& r, size_t off, size_t n, const Cell& c, bool write) {
  cur ? void(cur->pc = who.pc) : void();
  if (c.flags & kFlight)
    fault("in-flight", "%s of %s, into which an asynchronous copy is not yet waited for [copy issued at pc %x]", write ? "write" : "read", at(r, off, n).c_str(), c.wpc);
  if (c.flags & kSource) fault("in-flight", "write of %s, which an asynchronous copy to global memory may still be reading: no bulk_copies_read since", at(r, off, n).c_str());
  if (c.flags & kMbar) fault("mbarrier", "plain %s of %s, which is an mbarrier", write ? "write" : "read", at(r, off, n).c_str());
}

[[noreturn]] void race(const Actor& who, const Region& r, size_t off, size_t n, const char* mine, const char* theirs, uint32_t gid, uint32_t pc) {
  if (cur) cur->pc = who.pc;
  if (gid == previous_grid_gid()) fault("dependency", "%s of %s, which the preceding kernel may still be using: no griddep_wait before it", mine, at(r, off, n).c_str());
  fault("race", "%s of %s is not ordered after its %s by %s [pc %x]", mine, at(r, off, n).c_str(), theirs, thread_name(gid).c_str(), pc);
}

// Whether the async proxy may not have heard of the last write. In shared memory anybody's fence behind the write will do; in global memory it is one by the thread
// that asks for the copy, since it learnt of the write. What a copy has written there is known to those of the same block.
bool unknown_to_copies(const Actor& who, const Region& r, const Cell& c) {
  if (c.wgid == kNobody) return false;
  if (r.shared) return !(c.flags & kAsync) && !fenced(who.view, c.wgid, c.wclk);
  if (c.wgid == previous_grid_gid() || (c.flags & kAsync && slot_of(c.wgid) == slot_of(who.gid))) return false;
  if (!cur->global_fence) return true;
  return (c.wgid == who.gid ? cur->global_fence_clock : cur->global_fence->at(kKnown, c.wgid)) < c.wclk;
}

[[noreturn]] void across_proxies(const Actor& who, const Region& r, size_t off, size_t n, const Cell& c, const char* what) {
  if (cur) cur->pc = who.pc;
  fault("proxy", "the async proxy %s %s, written by %s [pc %x] with no fence_proxy_async%s since", what, at(r, off, n).c_str(), thread_name(c.wgid).c_str(), c.wpc,
        r.shared ? "" : "_global by this thread");
}

// Loads from shared memory may still be under way when their thread has gone on, even past a barrier: other loads and stores come behind them, copies do not.
[[noreturn]] void over_loads(const Actor& who, const Region& r, size_t off, size_t n, const Reader& rd) {
  if (cur) cur->pc = who.pc;
  fault("proxy", "the async proxy overwrites %s, read by %s [pc %x] with no fence_proxy_async since", at(r, off, n).c_str(), thread_name(rd.gid).c_str(), rd.pc);
}
}  // namespace

uint8_t* map_guarded(size_t size, size_t align, bool exact_align) {
  constexpr size_t page = 4096;
  size_t inner = (size + 2 * align + page) / page * page + page;
  auto* m = (uint8_t*)mmap(nullptr, inner + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (m == MAP_FAILED || mprotect(m + page, inner, PROT_READ | PROT_WRITE)) {
    fprintf(stderr, "fault: setup\ntext: cannot map %zu bytes\n", size);
    exit(2);
  }
  auto at = (uintptr_t(m) + page + 2 * align - 1) & ~(2 * align - 1);
  if (exact_align) at += align;   // no better aligned than asked for
  return (uint8_t*)at;
}

Region* add_region(Region r) {
  auto* p = new Region(r);
  if (p->writable && p->size) {
    p->cells = (Cell*)mmap(nullptr, p->size * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p->cells == MAP_FAILED) {
      fprintf(stderr, "fault: setup\ntext: no memory for the shadow of %s\n", p->name.c_str());
      exit(2);
    }
    for (size_t i = 0; i < p->size; i++) p->cells[i].wgid = p->cells[i].rgid = kNobody;
  }
  // Blocks come and go: reuse the place of a dead one.
  for (Region*& old : regions)
    if (old->shared && !old->size) {
      old = p;
      return p;
    }
  regions.push_back(p);
  return p;
}

Region* find_region(const void* p) {
  for (Region* r : regions)
    if (r->holds(p)) return r;
  return nullptr;
}

void check_read(const Actor& who, Region& r, size_t off, size_t n, Access kind) {
  if (!r.cells) {
    if (r.dependent && g.opt.pdl && !knows(who.view, who.gid, previous_grid_gid(), 1)) race(who, r, off, n, "read", "write", previous_grid_gid(), 0);
    return;
  }
  const Reader reader{uint16_t(who.gid), kind == Access::plain, who.clock, who.pc, warp_of(who.gid)};
  uint32_t known_gid = kNobody, known_clock = 0;   // the last write that turned out to be known: neighbouring bytes mostly have the same
  for (size_t i = off; i < off + n; i++) {
    Cell& c = r.cells[i];
    if (c.flags & kScratch) continue;
    if (c.flags & (kFlight | kMbar)) check_state(who, r, i, n, c, false);
    if (!(c.flags & kInit) && g.opt.strict_init) {
      if (cur) cur->pc = who.pc;
      fault("uninitialised", "read of %s: byte %zu was never written", at(r, off, n).c_str(), i);
    }
    if (!g.opt.races) continue;
    bool both_atomic = kind == Access::atomic && (c.flags & kAtomic);
    if (c.wgid != kNobody && !both_atomic && !(c.wgid == known_gid && c.wclk == known_clock)) {
      if (!knows(who.view, who.gid, c.wgid, c.wclk)) race(who, r, i, n, "read", "write", c.wgid, c.wpc);
      known_gid = c.wgid;
      known_clock = c.wclk;
    }
    if (kind == Access::async && unknown_to_copies(who, r, c)) across_proxies(who, r, i, n, c, "reads");
    if (kind != Access::atomic) add_reader(c, reader);
  }
}

void check_read_later(const Actor& who, Region& r, size_t off, size_t n, uint32_t gid, uint32_t clock) {
  check_read(who, r, off, n, Access::async);
  if (!g.opt.races) return;
  const Reader reader{uint16_t(gid), false, clock, who.pc, warp_of(gid)};
  for (size_t i = off; i < off + n; i++)
    if (!(r.cells[i].flags & kScratch)) add_reader(r.cells[i], reader);
}

void check_write(const Actor& who, Region& r, size_t off, size_t n, Access kind) {
  if (!r.cells) {
    if (cur) cur->pc = who.pc;
    fault("bounds", "write of %s, which is read-only", at(r, off, n).c_str());
  }
  for (size_t i = off; i < off + n; i++) {
    Cell& c = r.cells[i];
    if (c.flags & kScratch) continue;
    if (c.flags & (kFlight | kMbar | kSource)) check_state(who, r, i, n, c, true);
    if (!g.opt.races) continue;
    bool both_atomic = kind == Access::atomic && (c.flags & kAtomic);
    // A copy into shared memory may follow reads, and copies, that are over, and all may follow what a copy has read there; whatever else follows must be ordered.
    const bool copies = kind == Access::async && r.shared;
    auto after_write = copies && c.flags & kAsync ? is_over : knows;
    if (c.wgid != kNobody && !both_atomic && !after_write(who.view, who.gid, c.wgid, c.wclk)) race(who, r, i, n, "write", "write", c.wgid, c.wpc);
    auto after_read = [&](const Reader& rd) {
      if (!(copies || is_engine(rd.gid) ? is_over : knows)(who.view, who.gid, rd.gid, rd.clock)) race(who, r, i, n, "write", "read", rd.gid, rd.pc);
      if (copies && rd.plain && !read_fenced(who.view, rd.gid, rd.clock)) over_loads(who, r, i, n, rd);
    };
    if (c.rgid != kNobody) after_read({c.rgid, (c.flags & kPlainRead) != 0, c.rclk, c.rpc, 0});
    if (c.more)
      for (const Reader& rd : read_sets[c.more]) after_read(rd);
    if (kind == Access::async && unknown_to_copies(who, r, c)) across_proxies(who, r, i, n, c, "overwrites");
  }
}

void mark_written(Region& r, size_t off, size_t n, uint32_t gid, uint32_t clock, uint32_t pc, uint8_t flags) {
  for (size_t i = off; i < off + n; i++) {
    Cell& c = r.cells[i];
    if (c.rgid != kNobody) drop_readers(c);
    c.wgid = uint16_t(gid);
    c.wclk = clock;
    c.wpc = pc;
    c.flags = uint8_t(flags | (c.flags & kScratch));
  }
}

Region& checked(const void* p, size_t n, size_t align, bool write, Access kind, const char* what) {
  Region* r = cur->block->smem->holds(p) ? cur->block->smem : find_region(p);
  if (!r) {
    for (Region* o : regions)
      if ((uintptr_t)p + 4096 > (uintptr_t)o->base && (uintptr_t)p < (uintptr_t)o->base + o->size + 4096 && o->size)
        fault("bounds", "%s of %zu bytes at %s%+lld (its size is %zu)", what, n, o->name.c_str(), (long long)((const uint8_t*)p - o->base), o->size);
    fault("bounds", "%s of %zu bytes at %p, which is no buffer of this launch", what, n, p);
  }
  size_t off = size_t((const uint8_t*)p - r->base);
  if (n > r->size - off) fault("bounds", "%s of %zu bytes at %s+%zu (its size is %zu)", what, n, r->name.c_str(), off, r->size);
  if (r->shared && r != cur->block->smem) fault("bounds", "%s of another block's shared memory", what);
  if (align > 1 && uintptr_t(p) % align) fault("alignment", "%s at %s is not aligned to %zu", what, at(*r, off, n).c_str(), align);
  if (kind == Access::plain) cur->polls = 0;
  Actor me = here();
  if (write) {
    check_write(me, *r, off, n, kind);
    mark_written(*r, off, n, me.gid, me.clock, me.pc, uint8_t(kInit | (kind == Access::atomic ? kAtomic : 0)));
  } else {
    check_read(me, *r, off, n, kind);
  }
  return *r;
}

static uint8_t* shared_place(uint32_t addr, uint32_t bytes, const char* what) {
  Region* s = cur->block->smem;
  size_t off = size_t(addr) - kSharedOrigin;
  if (off > s->size || off + bytes > s->size) fault("bounds", "%s of %u bytes at shared address %zd: shared memory has %zu bytes", what, bytes, ssize_t(off), s->size);
  return s->base + off;
}

void scratch(uint32_t addr, uint32_t bytes) {
  ZS_ENTER();
  size_t off = size_t(shared_place(addr, bytes, "scratch_bytes") - cur->block->smem->base);
  for (size_t i = off; i < off + bytes; i++) cur->block->smem->cells[i].flags |= kScratch;
}

void load_shared(void* to, uint32_t addr, uint32_t bytes) {
  ZS_ENTER();
  maybe_preempt();
  uint8_t* p = shared_place(addr, bytes, "read");
  checked(p, bytes, bytes, false, Access::plain, "read");
  memcpy(to, p, bytes);
}

void store_shared(uint32_t addr, const void* from, uint32_t bytes) {
  ZS_ENTER();
  maybe_preempt();
  uint8_t* p = shared_place(addr, bytes, "write");
  checked(p, bytes, bytes, true, Access::plain, "write");
  memcpy(p, from, bytes);
}

void load_global(void* to, const void* p, uint32_t bytes) {
  ZS_ENTER();
  maybe_preempt();
  if (checked(p, bytes, bytes, false, Access::plain, "read").shared) fault("bounds", "a global load from shared memory");
  memcpy(to, p, bytes);
}

void store_global(void* p, const void* from, uint32_t bytes) {
  ZS_ENTER();
  maybe_preempt();
  if (checked(p, bytes, bytes, true, Access::plain, "write").shared) fault("bounds", "a global store to shared memory");
  memcpy(p, from, bytes);
}

}  // namespace zsemu

// ---- hooks of compiled code
// A thread's own stack, and the program itself: constants and tables are in it.
static inline bool is_private(const void* p) {
  auto a = (uintptr_t)p, s = (uintptr_t)zsemu::cur->stack;
  return a - s < zsemu::kStack || (a >= (uintptr_t)&__executable_start && a < (uintptr_t)&end);
}

#define HOOK(name, n, align, write)                                                                              \
  extern "C" void __tsan_##name(void* p) {                                                                       \
    if (!zsemu::cur || is_private(p)) return;                                                                    \
    ZS_ENTER();                                                                                                  \
    zsemu::maybe_preempt();                                                                                      \
    zsemu::checked(p, n, align, write, zsemu::Access::plain, write ? "write" : "read");                          \
  }
#define HOOKS(n)                       \
  HOOK(read##n, n, n, false)           \
  HOOK(write##n, n, n, true)           \
  HOOK(unaligned_read##n, n, 1, false) \
  HOOK(unaligned_write##n, n, 1, true) \
  HOOK(volatile_read##n, n, n, false)  \
  HOOK(volatile_write##n, n, n, true)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
extern "C" void __tsan_read_range(void* p, size_t n) {
  if (!zsemu::cur || is_private(p)) return;
  ZS_ENTER();
  zsemu::checked(p, n, 1, false, zsemu::Access::plain, "read");
}
extern "C" void __tsan_write_range(void* p, size_t n) {
  if (!zsemu::cur || is_private(p)) return;
  ZS_ENTER();
  zsemu::checked(p, n, 1, true, zsemu::Access::plain, "write");
}
extern "C" void* __tsan_memcpy(void* d, const void* s, size_t n) {
  if (n && zsemu::cur) {
    __tsan_read_range((void*)s, n);
    __tsan_write_range(d, n);
  }
  return memcpy(d, s, n);
}
extern "C" void* __tsan_memset(void* d, int v, size_t n) {
  if (n && zsemu::cur) __tsan_write_range(d, n);
  return memset(d, v, n);
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
