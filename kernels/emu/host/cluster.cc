// SPDX-License-Identifier: Apache-2.0
// Thread-block clusters: the blocks that run together, their barrier, and that none of them ends while another still uses its shared memory.
#include <algorithm>
#include "warp.h"

namespace zsemu {

namespace {
void complete_phase(Cluster& c) {
  if (!c.arrived || c.arrived < c.live) return;
  c.phase++;
  c.arrived = 0;
  c.released = std::move(c.gathered);
  c.gathered.clear();
  for (Fiber* f : c.waiting) wake(f);
  c.waiting.clear();
  progress();
}

void arrive(bool publishes) {
  meet(kClusterArrive, 0xFFFFFFFFu, nullptr, nullptr, false);   // .aligned
  Cluster& c = *cur->block->cluster;
  if (cur->at_cluster) fault("barrier", "a second arrival at the cluster's barrier with no cluster_wait between");
  cur->at_cluster = true;
  cur->cluster_phase = c.phase;
  if (g.opt.races) (publishes || g.opt.cluster == 1 ? release_into : release_reads_into)(c.gathered, cur);
  c.arrived++;
  complete_phase(c);
}

void wait() {
  meet(kClusterWait, 0xFFFFFFFFu, nullptr, nullptr, false);
  Cluster& c = *cur->block->cluster;
  if (!cur->at_cluster) fault("barrier", "a cluster_wait with no arrival before it");
  if (c.phase == cur->cluster_phase) {
    c.waiting.push_back(cur);
    cur->waits = {"the barrier of the cluster", ", %llu threads", {c.live}};
    suspend();
  }
  cur->at_cluster = false;
  if (g.opt.races) acquire(cur, c.released);
}
}  // namespace

uint32_t cluster_rank() { return cur->block->rank; }

void cluster_arrive_relaxed() {
  ZS_ENTER();
  arrive(false);
  yield();
}

void cluster_wait() {
  ZS_ENTER();
  yield();
  wait();
}

void cluster_sync() {
  ZS_ENTER();
  arrive(true);
  yield();
  wait();
}

bool knows_init(const View* v, uint32_t self, const Mbarrier& m) { return (m.fenced ? is_over : knows)(v, self, m.init.gid, m.init.clock); }

Block& block_of_cluster(uint32_t rank, const char* what) {
  Block* b = rank < g.opt.cluster ? cur->block->cluster->blocks[rank] : nullptr;
  if (rank >= g.opt.cluster) fault("argument", "%s to the block of rank %u of a cluster of %u", what, rank, g.opt.cluster);
  if (!b) fault("cluster", "%s to the block of rank %u of its cluster, which has ended", what, rank);
  return *b;
}

void note_foreign(Block& b, uint32_t gid, uint32_t clock, const char* what) {
  // Of one account the last is enough: who knows of it knows of those before.
  for (Foreign& f : b.foreign)
    if (f.gid == gid) {
      f = {gid, clock, cur->gid, cur->pc, what};
      return;
    }
  b.foreign.push_back({gid, clock, cur->gid, cur->pc, what});
}

void mbarrier_arrive_cluster(uint32_t addr, uint32_t rank, uint32_t count) {
  ZS_ENTER();
  Block& b = block_of_cluster(rank, "mbarrier_arrive_cluster");
  if (&b != cur->block) note_foreign(b, cur->gid, cur->clock, "an arrival at its mbarrier");
  arrive_in(b, addr - kSharedOrigin, count);
  yield();
}

void cluster_thread_ended(Fiber& f) {
  Cluster& c = *f.block->cluster;
  c.live--;
  if (f.at_cluster && f.cluster_phase == c.phase) c.arrived--;
  complete_phase(c);
}

void leave_cluster(Block& b) {
  if (g.opt.races)
    for (const Foreign& f : b.foreign) {
      // One thread of the block that knows is enough: the block is there until its last thread ends.
      bool known = std::any_of(b.threads.begin(), b.threads.end(), [&](const Fiber& t) { return is_over(t.view.get(), t.gid, f.gid, f.clock); });
      if (!known)
        fault("cluster", "block (%u,%u,%u) ended without waiting for %s by %s [pc %x], which may come later", b.idx.x, b.idx.y, b.idx.z, f.what,
              thread_name(f.by).c_str(), f.pc);
    }
  Cluster* c = b.cluster;
  c->blocks[b.rank] = nullptr;
  if (std::all_of(c->blocks.begin(), c->blocks.end(), [](const Block* o) { return !o; })) delete c;
}

}  // namespace zsemu
