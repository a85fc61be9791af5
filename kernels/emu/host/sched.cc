// SPDX-License-Identifier: Apache-2.0
// The scheduler: which thread runs next, and when asynchronous work lands. Each seed draws a policy, because a uniform choice
// alone rarely lets one warp run far ahead of another, or one copy be very late.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unistd.h>
#include "core.h"
#include "fiber.h"

namespace zsemu {

Launch g;
Fiber* cur;

namespace {
void* main_sp;
std::vector<Warp*> runnable;
std::vector<Block*> blocks;          // by slot
std::vector<uint32_t> waiting_clusters;
std::vector<std::vector<uint32_t>> clocks;   // of each slot's threads, kept across the blocks that use it
ViewRef root;
uint32_t finished;
int64_t lowest_prio;
uint64_t idle_polls;

struct Policy {
  bool by_priority;
  uint32_t leave_warp, land, preempt;   // one in ...
} policy;

void draw_policy() {
  static const uint32_t leave[] = {1, 3, 16, 0}, landing[] = {2, 16, 256, 0}, preempting[] = {0, 0, 256, 24};
  policy.by_priority = rnd() & 1;
  policy.leave_warp = leave[rnd() % 4];
  policy.land = landing[rnd() % 4];
  policy.preempt = preempting[rnd() % 4];
}

void set_ready(Fiber* f) {
  Warp* w = f->warp;
  if (!w->ready) {
    w->pos = uint32_t(runnable.size());
    runnable.push_back(w);
  }
  w->ready |= 1u << f->lane;
}

void clear_ready(Fiber* f) {
  Warp* w = f->warp;
  w->ready &= ~(1u << f->lane);
  if (!w->ready) {
    runnable[w->pos] = runnable.back();
    runnable[w->pos]->pos = w->pos;
    runnable.pop_back();
  }
}

[[noreturn]] void thread_main();

// Block n of the grid begins in a free slot.
Block* start_block(size_t slot, uint32_t n) {
  auto* b = new Block;
  blocks[slot] = b;
  const Idx gd = g.opt.grid, bd = g.opt.block;
  b->idx = {n % gd.x, n / gd.x % gd.y, n / (gd.x * gd.y)};
  b->slot = uint32_t(slot);
  b->live = g.threads;
  b->threads.resize(g.threads);
  b->warps.resize((g.threads + 31) / 32);
  Region r;
  r.name = g.opt.cluster > 1 ? format("shared memory of block (%u,%u,%u)", b->idx.x, b->idx.y, b->idx.z) : "shared memory";
  r.size = g.opt.shared;
  r.writable = r.shared = true;
  r.base = map_guarded(r.size, 1024, false);
  memset(r.base, kPoison, r.size);
  b->smem = add_region(r);
  for (uint32_t i = 0; i < b->warps.size(); i++) {
    b->warps[i].block = b;
    b->warps[i].id = i;
    b->warps[i].prio = int64_t(rnd() % 1000000);
  }
  for (uint32_t t = 0; t < g.threads; t++) {
    Fiber& f = b->threads[t];
    f.block = b;
    f.warp = &b->warps[t / 32];
    f.lane = t % 32;
    f.tid = t;
    f.idx = {t % bd.x, t / bd.x % bd.y, t / (bd.x * bd.y)};
    f.gid = gid_in_slot(uint32_t(slot), t);
    f.clock = ++clocks[slot][t];
    f.view = root;
    f.stack = take_stack();
    f.sp = prepare_stack(f.stack, thread_main);
    f.warp->lane[f.lane] = &f;
    f.warp->live |= 1u << f.lane;
    set_ready(&f);
  }
  return b;
}

// The blocks of a cluster begin together, in slots that stand together.
bool start_cluster() {
  if (waiting_clusters.empty()) return false;
  const uint32_t size = g.opt.cluster;
  size_t slot = 0;
  auto busy = [&] {
    for (uint32_t i = 0; i < size; i++)
      if (blocks[slot + i]) return true;
    return false;
  };
  while (slot < blocks.size() && busy()) slot += size;
  if (slot >= blocks.size()) return false;
  uint32_t n = waiting_clusters.back();
  waiting_clusters.pop_back();
  auto* c = new Cluster;
  c->live = size * g.threads;
  for (uint32_t i = 0; i < size; i++) {
    Block* b = start_block(slot + i, n * size + i);
    b->cluster = c;
    b->rank = i;
    c->blocks.push_back(b);
  }
  return true;
}

void end_block(Block* b) {
  leave_cluster(*b);
  if (block_has_flight(b)) fault("in-flight", "block (%u,%u,%u) ended while a bulk copy of its shared memory was in flight", b->idx.x, b->idx.y, b->idx.z);
  if (!b->reading.empty()) fault("in-flight", "block (%u,%u,%u) ended while a copy to global memory was reading its shared memory", b->idx.x, b->idx.y, b->idx.z);
  forget_copies(b);
  for (uint32_t t = 0; t < g.threads; t++) {
    clocks[b->slot][t] = b->threads[t].clock;
    return_stack(b->threads[t].stack);
  }
  b->smem->size = 0;     // pointers to it are wild from now on
  blocks[b->slot] = nullptr;
  delete b;
  finished++;
}

[[noreturn]] void deadlock(const char* kind) {
  std::string text = kind;
  int lines = 0;
  for (Block* b : blocks) {
    if (!b) continue;
    for (Warp& w : b->warps) {
      std::map<std::string, uint32_t> by;
      for (int l = 0; l < 32; l++)
        if (w.lane[l] && !w.lane[l]->done) by[w.lane[l]->waits.what ? w.lane[l]->waits.text() : "polls memory"] |= 1u << l;
      for (auto& [why, mask] : by) {
        if (++lines > 100) continue;
        text += format("\n  block (%u,%u,%u) warp %u lanes %08x: %s [pc %x]", b->idx.x, b->idx.y, b->idx.z, w.id, mask, why.c_str(),
                       w.lane[__builtin_ctz(mask)]->pc);
      }
    }
  }
  fault("deadlock", "%s", text.c_str());
}

Fiber* pick() {
  if (policy.land && chance(policy.land)) land_one();
  while (runnable.empty()) {
    if (land_one()) continue;
    return nullptr;
  }
  Warp* w = cur ? cur->warp : nullptr;
  if (!w || !w->ready || chance(policy.leave_warp)) {
    w = runnable[rnd() % runnable.size()];
    if (policy.by_priority) {
      if (chance(64)) w->prio = int64_t(rnd() % 1000000);   // a change of mind now and then
      for (Warp* o : runnable)
        if (o->prio > w->prio) w = o;
    }
  }
  uint32_t mask = w->ready;
  uint32_t skip = uint32_t(rnd()) % uint32_t(__builtin_popcount(mask));
  while (skip--) mask &= mask - 1;
  g.switches++;
  return w->lane[__builtin_ctz(mask)];
}

void switch_to(Fiber* next) {
  Fiber* self = cur;
  if (next == self) return;
  if (!next) {
    cur = nullptr;
    switch_stack(&self->sp, main_sp);
  } else {
    cur = next;
    switch_stack(&self->sp, next->sp);
  }
}

[[noreturn]] void thread_main() {
  static uint64_t slots[64];   // in the program's own data, which compiled code may read
  std::copy(g.args.begin(), g.args.end(), slots);
  g.entry->call(slots);
  Fiber* f = cur;
  f->done = true;
  f->warp->live &= ~(1u << f->lane);
  f->block->live--;
  if (!f->warp->open.empty() || !f->warp->groups.empty()) fault("wgmma", "a warp ended before it waited for its wgmma groups");
  clear_ready(f);
  cluster_thread_ended(*f);
  cur = nullptr;
  void* unused;
  switch_stack(&unused, main_sp);
  __builtin_unreachable();
}
}  // namespace

uint64_t rnd() {   // splitmix64
  static uint64_t state = 0;
  if (!state) state = g.opt.seed * 0x9E3779B97F4A7C15ull + 0x1234567;
  uint64_t z = (state += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

void progress() { idle_polls = 0; }
void yield() { switch_to(pick()); }

void maybe_preempt() {
  if (policy.preempt && chance(policy.preempt)) yield();
}

void spin_yield() {
  cur->warp->prio = --lowest_prio;
  // Pollers are always runnable, so copies that land only when nobody can run would land never.
  if (++idle_polls % 64 == 0 && land_one()) idle_polls = 0;
  if (idle_polls > 4000 + 200ull * g.resident * g.threads) deadlock("threads poll memory and nothing changes");
  // A poller must not keep its warp: pick from all, twice, which prefers whoever does not poll.
  for (int i = 0; i < 2; i++) {
    Warp* w = runnable[rnd() % runnable.size()];
    if (i == 0 && w->prio < 0) continue;
    uint32_t mask = w->ready;
    uint32_t skip = uint32_t(rnd()) % uint32_t(__builtin_popcount(mask));
    while (skip--) mask &= mask - 1;
    g.switches++;
    switch_to(w->lane[__builtin_ctz(mask)]);
    return;
  }
}

void suspend() {
  clear_ready(cur);
  switch_to(pick());
}

void resume(Fiber* f) {
  f->waits = {};
  set_ready(f);
}

void wake(Fiber* f) {
  resume(f);
  progress();
}

void run_launch() {
  const Options& o = g.opt;
  uint32_t total = o.grid.x * o.grid.y * o.grid.z;
  root = std::make_shared<View>(o.pdl ? View() : previous_grid());
  draw_policy();
  blocks.assign(g.resident, nullptr);
  clocks.assign(g.resident, std::vector<uint32_t>(g.threads, 0));
  const uint32_t clusters = total / o.cluster;   // ranks count along x, of which the grid has a multiple
  for (uint32_t i = 0; i < clusters; i++) waiting_clusters.push_back(i);
  for (uint32_t i = clusters; i > 1; i--) std::swap(waiting_clusters[i - 1], waiting_clusters[rnd() % i]);
  while (start_cluster()) {
  }
  while (finished < total) {
    Fiber* next = pick();
    if (!next) deadlock("nobody can run");
    cur = next;
    switch_stack(&main_sp, next->sp);
    for (Block* b : blocks)
      if (b && !b->live) {
        end_block(b);
        start_cluster();
      }
  }
  while (land_one()) {   // what goes to global memory may outlive its block
  }
}

std::string thread_name(uint32_t gid) {
  if (gid == kNobody) return "nobody";
  if (gid == previous_grid_gid()) return "the preceding kernel";
  const uint32_t slot = slot_of(gid), tid = place_in_slot(gid);
  if (is_engine(gid)) return format("an asynchronous copy of block slot %u", slot);
  Block* b = blocks[slot];
  if (!b) return format("thread %u of an ended block", tid);
  return format("thread %u (warp %u lane %u) of block (%u,%u,%u)", tid, tid / 32, tid % 32, b->idx.x, b->idx.y, b->idx.z);
}

std::string format(const char* fmt, ...) {
  char buf[1024];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(buf, sizeof buf, fmt, ap);
  va_end(ap);
  return buf;
}

void fault(const char* kind, const char* fmt, ...) {
  fprintf(stderr, "fault: %s\nseed: %llu\n", kind, (unsigned long long)g.opt.seed);
  if (cur) fprintf(stderr, "where: kernel %s, %s\npc: %x\n", g.entry->name, thread_name(cur->gid).c_str(), cur->pc);
  fprintf(stderr, "text: ");
  va_list ap;
  va_start(ap, fmt);
  vfprintf(stderr, fmt, ap);
  va_end(ap);
  fprintf(stderr, "\n");
  fflush(stderr);
  _exit(3);
}

Idx thread_idx() { return cur->idx; }
Idx block_idx() { return cur->block->idx; }
Idx block_dim() { return g.opt.block; }
Idx grid_dim() { return g.opt.grid; }
uint8_t* shared_base() { return cur->block->smem->base; }
uint32_t shared_addr(const void* p) {
  const Region* s = cur->block->smem;
  auto* b = (const uint8_t*)p;
  if (b < s->base || b > s->base + s->size) {
    ZS_ENTER();
    fault("bounds", "a shared-memory address was taken of %p, which is not in this block's shared memory", p);
  }
  return uint32_t(b - s->base) + kSharedOrigin;
}

}  // namespace zsemu
