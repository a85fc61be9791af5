// SPDX-License-Identifier: Apache-2.0
// Block barriers (bar.sync, bar.arrive, bar.red) and mbarriers.
#include <utility>
#include "core.h"

namespace zsemu {

namespace {
// True when this arrival completed the barrier's phase.
bool arrive_at(uint32_t id, uint32_t threads, bool waits) {
  if (id >= 16) fault("argument", "barrier %u: a block has 16", id);
  if (threads % 32 && threads != g.threads) fault("argument", "barrier %u for %u threads: not whole warps", id, threads);
  if (threads > g.threads) fault("argument", "barrier %u for %u threads: the block has %u", id, threads, g.threads);
  Fiber* f = cur;
  Barrier& b = f->block->barriers[id];
  if (b.arrived == 0)
    b.expected = threads;
  else if (b.expected != threads)
    fault("barrier", "barrier %u is used for %u threads while others wait at it for %u", id, threads, b.expected);
  b.arrived++;
  if (waits)
    b.waiting.push_back(f);
  else if (g.opt.races)
    release_into(b.gathered, f);
  if (b.arrived < b.expected) return false;
  if (g.opt.races) sync_group(b.waiting, &b.gathered);
  for (Fiber* w : b.waiting) {
    w->votes[0] = b.votes_count;
    w->votes[1] = b.arrived;
    if (w != f) wake(w);
  }
  b.waiting.clear();
  b.gathered.clear();
  b.arrived = 0;
  return true;
}

Mbarrier& mbarrier_of(Block* b, uint32_t off, const char* what) {
  auto it = b->mbars.find(off);
  if (it == b->mbars.end())
    fault("mbarrier", "%s at shared address %u%s, where no mbarrier was initialised", what, off, b == cur->block ? "" : " of another block of the cluster");
  Mbarrier& m = it->second;
  if (g.opt.races && !knows_init(cur->view.get(), cur->gid, m))
    fault("race", "%s at shared address %u is not ordered after its mbarrier_init by %s [pc %x]", what, off, thread_name(m.init.gid).c_str(), m.init.pc);
  return m;
}

Mbarrier& find_mbarrier(uint32_t addr, const char* what) { return mbarrier_of(cur->block, addr - kSharedOrigin, what); }

void try_complete(Block* b, Mbarrier& m) {
  (void)b;
  if (m.pending || m.tx) return;
  m.phase++;
  m.pending = m.count;
  m.released = std::move(m.gathered);
  m.gathered.clear();
  for (Fiber* f : m.waiters) wake(f);
  m.waiters.clear();
  progress();
}
}  // namespace

void barrier_sync(uint32_t id, uint32_t threads) {
  ZS_ENTER();
  if (!threads) threads = g.threads;
  cur->waits = {"barrier", " %llu for %llu threads", {id, threads}};
  if (!arrive_at(id, threads, true)) {
    suspend();
  } else {
    cur->waits = {};
    yield();
  }
}

void barrier_arrive(uint32_t id, uint32_t threads) {
  ZS_ENTER();
  if (!threads) fault("argument", "an arrival at barrier %u for 0 threads", id);
  arrive_at(id, threads, false);
  yield();
}

uint32_t barrier_reduce(Vote kind, bool pred) {
  ZS_ENTER();
  Barrier& b = cur->block->barriers[0];
  if (!b.arrived) b.votes_count = 0;
  b.votes_count += pred;
  cur->waits = {"a reducing block barrier"};
  if (arrive_at(0, g.threads, true)) {
    cur->waits = {};
    yield();
  } else {
    suspend();
  }
  uint32_t yes = cur->votes[0], all = cur->votes[1];
  return kind == Vote::any ? yes != 0 : kind == Vote::all ? yes == all : yes;
}

void mbarrier_init(uint32_t addr, uint32_t count) {
  ZS_ENTER();
  Block* b = cur->block;
  uint32_t off = addr - kSharedOrigin;
  if (off % 8 || off + 8 > b->smem->size) fault("alignment", "mbarrier_init at shared address %u (shared memory has %zu bytes)", off, b->smem->size);
  if (!count || count >= 1u << 20) fault("argument", "mbarrier_init with count %u", count);
  if (b->mbars.count(off)) fault("mbarrier", "a second mbarrier_init at shared address %u", off);
  if (b->mbars.size() >= kMaxMbarriers) fault("argument", "more than %u mbarriers in a block", kMaxMbarriers);
  Actor me = here();
  check_write(me, *b->smem, off, 8, Access::plain);
  mark_written(*b->smem, off, 8, me.gid, me.clock, me.pc, kInit | kMbar);
  Mbarrier& m = b->mbars[off];
  m.count = m.pending = count;
  m.index = uint32_t(b->mbars.size() - 1);
  m.init = me;
}

void fence_own_mbarriers() {
  for (auto& [off, m] : cur->block->mbars)
    if (m.init.gid == cur->gid) m.fenced = true;
}

void fence_mbarrier_init() {
  ZS_ENTER();
  fence_own_mbarriers();
}

void mbarrier_expect_tx(uint32_t addr, uint32_t bytes) {
  ZS_ENTER();
  Mbarrier& m = find_mbarrier(addr, "mbarrier_expect_tx");
  m.tx += bytes;
  if (m.tx >= 1 << 20) fault("mbarrier", "the transaction count at shared address %u passes 2^20 - 1", addr - kSharedOrigin);
}

void mbarrier_arrive(uint32_t addr, uint32_t count) {
  ZS_ENTER();
  Mbarrier& m = find_mbarrier(addr, "mbarrier_arrive");
  if (count > m.pending) fault("mbarrier", "an arrival too many at shared address %u: its count is %u, phase %u", addr - kSharedOrigin, m.count, m.phase);
  if (g.opt.races) release_into(m.gathered, cur);
  m.pending -= count;
  try_complete(cur->block, m);
  yield();
}

void arrive_in(Block& b, uint32_t off, uint32_t count) {
  Mbarrier& m = mbarrier_of(&b, off, "mbarrier_arrive_cluster");
  if (count > m.pending) fault("mbarrier", "an arrival too many at shared address %u of block (%u,%u,%u): its count is %u, phase %u", off, b.idx.x, b.idx.y, b.idx.z, m.count, m.phase);
  if (g.opt.races) (&b == cur->block ? release_into : release_reads_into)(m.gathered, cur);
  m.pending -= count;
  try_complete(&b, m);
}

void arrive_for(Block* b, uint32_t off, const Gathered& knowledge) {
  Mbarrier& m = b->mbars[off];
  if (!m.pending) fault("mbarrier", "an arrival too many at shared address %u: its count is %u, phase %u", off, m.count, m.phase);
  if (g.opt.races) m.gathered.join(knowledge);
  m.pending--;
  try_complete(b, m);
}

void complete_tx(Block* b, uint32_t off, uint32_t bytes, uint32_t gid, uint32_t clock) {
  auto it = b->mbars.find(off);
  if (it == b->mbars.end()) fault("mbarrier", "a copy landed for the mbarrier at shared address %u, which is gone", off);
  Mbarrier& m = it->second;
  m.tx -= bytes;
  if (m.tx <= -(1 << 20)) fault("mbarrier", "the transaction count at shared address %u passes -2^20", off);
  if (g.opt.races) m.gathered.raise(kKnown, gid, clock);
  try_complete(b, m);
}

void cp_async_mbarrier_arrive(uint32_t addr) {
  ZS_ENTER();
  find_mbarrier(addr, "cp_async_mbarrier_arrive");
  cp_async_then_arrive(addr - kSharedOrigin);
  yield();
}

bool mbarrier_test(uint32_t addr, uint32_t parity) {
  ZS_ENTER();
  if (parity > 1) fault("argument", "mbarrier_test with parity %u", parity);
  Mbarrier& m = find_mbarrier(addr, "mbarrier_test");
  yield();
  if ((m.phase & 1) == parity) {
    spin_yield();
    return false;
  }
  if (chance(4)) return false;   // this thread has not heard of it yet
  if (g.opt.races) acquire(cur, m.released);
  return true;
}

void mbarrier_wait(uint32_t addr, uint32_t parity) {
  ZS_ENTER();
  if (parity > 1) fault("argument", "mbarrier_wait with parity %u", parity);
  Mbarrier& m = find_mbarrier(addr, "mbarrier_wait");
  yield();
  if ((m.phase & 1) == parity) {
    m.waiters.push_back(cur);
    cur->waits = {"mbarrier", " at shared address %llu, parity %llu (in phase %llu, %llu of %llu arrivals and %lld bytes missing)",
                  {addr - kSharedOrigin, parity, m.phase, m.pending, m.count, (unsigned long long)m.tx}};
    suspend();
  }
  if (g.opt.races) acquire(cur, m.released);
}

}  // namespace zsemu
