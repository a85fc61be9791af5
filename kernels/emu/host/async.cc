// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies into shared memory, also of several blocks of a cluster. The bytes arrive at a random later point, in pieces and in any order; until
// somebody has properly waited for them, every access to the destination is a fault, landed or not, so a missing wait is seen whatever the schedule.
#include <algorithm>
#include <cstring>
#include "core.h"

namespace zsemu {

static std::vector<CopyRef> flight;

void take_off(const CopyRef& c) {
  memset(c->to->base + c->off, kPoison, c->bytes + c->fill);
  mark_written(*c->to, c->off, c->bytes + c->fill, c->gid, c->clock, c->pc, kFlight | (c->mbar == kNone ? 0 : kAsync));
  flight.push_back(c);
  g.copies++;
}

size_t shared_offset(uint32_t addr, uint32_t bytes, uint32_t align, const char* what) {
  Region* s = cur->block->smem;
  size_t off = addr - kSharedOrigin;
  if (off + bytes > s->size) fault("bounds", "%s of %u bytes at shared address %zu: shared memory has %zu bytes", what, bytes, off, s->size);
  if (off % align) fault("alignment", "%s at shared address %zu is not aligned to %u", what, off, align);
  return off;
}

void settle(Copy& c, uint32_t gid, uint32_t clock) {
  if (c.settled) return;
  c.settled = true;
  mark_written(*c.to, c.off, c.bytes + c.fill, gid, clock, c.pc, uint8_t(kInit | (c.keep ? kAsync : 0)));
}

void land(const CopyRef& c) {
  if (c->landed) return;
  c->landed = true;
  for (auto& before : c->after) land(before);
  auto it = std::find(flight.begin(), flight.end(), c);
  if (it != flight.end()) {
    std::swap(*it, flight.back());
    flight.pop_back();
  }
  if (!c->knowledge.empty()) {   // an arrival
    for (auto& before : c->after) settle(*before, before->gid, before->clock);   // a later arrival may land earlier
    arrive_for(c->block, c->mbar, c->knowledge);
    return;
  }
  uint8_t* to = c->to->base + c->off;
  memcpy(to, c->from, c->bytes);
  memset(to + c->bytes, 0, c->fill);
  if (c->mbar != kNone) {
    mark_written(*c->to, c->off, c->bytes + c->fill, c->gid, c->clock, c->pc, kInit | kAsync);
    complete_tx(c->block, c->mbar, uint32_t(c->bytes + c->fill), c->gid, c->clock);
  }
}

bool land_one() {
  if (flight.empty()) return false;
  CopyRef c = flight[rnd() % flight.size()];
  for (auto& before : c->after)   // an arrival comes last
    if (!before->landed) c = before;
  land(CopyRef(c));
  return true;
}

bool block_has_flight(const Block* b) {
  for (auto& c : flight)
    if (c->block == b && c->mbar != kNone && c->knowledge.empty()) return true;
  return false;
}

void forget_copies(const Block* b) {
  flight.erase(std::remove_if(flight.begin(), flight.end(), [&](const CopyRef& c) { return c->block == b; }), flight.end());
}

void cp_async(uint32_t dst, const void* src, uint32_t bytes, uint32_t src_bytes) {
  ZS_ENTER();
  if (bytes != 4 && bytes != 8 && bytes != 16) fault("argument", "cp.async of %u bytes", bytes);
  if (src_bytes > bytes) fault("argument", "cp.async with a source of %u bytes for %u", src_bytes, bytes);
  size_t off = shared_offset(dst, bytes, bytes, "cp.async");
  if (src_bytes) {
    if (uintptr_t(src) % bytes) fault("alignment", "cp.async of %u bytes from %p", bytes, src);
    checked(src, src_bytes, 1, false, Access::plain, "cp.async");
  }
  check_write(here(), *cur->block->smem, off, bytes, Access::plain);
  auto c = std::make_shared<Copy>();
  c->block = cur->block;
  c->to = cur->block->smem;
  c->off = off;
  c->bytes = src_bytes;
  c->fill = bytes - src_bytes;
  c->from = (const uint8_t*)src;
  c->gid = cur->gid;
  c->clock = cur->clock;
  c->pc = cur->pc;
  take_off(c);
  cur->open.copies.push_back(c);
}

void cp_async_commit() {
  ZS_ENTER();
  cur->groups.push_back(std::move(cur->open));
  cur->open = {};
}

void cp_async_wait(uint32_t pending) {
  ZS_ENTER();
  yield();
  size_t n = cur->groups.size() > pending ? cur->groups.size() - pending : 0;
  for (size_t i = 0; i < n; i++)
    for (auto& c : cur->groups[i].copies) {
      land(c);
      settle(*c, cur->gid, cur->clock);   // from here on the bytes are this thread's own writes: others still need a barrier
    }
  cur->groups.erase(cur->groups.begin(), cur->groups.begin() + long(n));
}

void cp_async_then_arrive(uint32_t mbar_off) {
  auto c = std::make_shared<Copy>();
  c->block = cur->block;
  c->to = cur->block->smem;
  c->off = c->bytes = c->fill = 0;
  c->from = nullptr;
  c->mbar = mbar_off;
  c->gid = cur->gid;
  c->clock = cur->clock;
  c->pc = cur->pc;
  release_into(c->knowledge, cur);
  for (CopyGroup& group : cur->groups)
    for (auto& before : group.copies)
      if (!before->settled) c->after.push_back(before);
  for (auto& before : cur->open.copies)
    if (!before->settled) c->after.push_back(before);
  flight.push_back(c);
}

namespace {
// The mbarrier that a copy names, which must be ready for the copy engine.
Mbarrier& copy_barrier(Block* b, uint32_t mbar, const char* what) {
  auto it = b->mbars.find(mbar - kSharedOrigin);
  if (it == b->mbars.end())
    fault("mbarrier", "%s names shared address %u%s, where no mbarrier was initialised", what, mbar - kSharedOrigin, b == cur->block ? "" : " of another block of the cluster");
  Mbarrier& m = it->second;
  if (g.opt.races && !knows_init(cur->view.get(), cur->gid, m))
    fault("race", "%s is not ordered after the mbarrier_init by %s [pc %x]", what, thread_name(m.init.gid).c_str(), m.init.pc);
  if (!m.fenced)
    fault("proxy", "%s uses the mbarrier at shared address %u, initialised with no fence_mbarrier_init since", what, mbar - kSharedOrigin);
  return m;
}

// The engine's clock: one for each mbarrier.
uint32_t engine_clock(uint32_t gid) {
  static std::map<uint32_t, uint32_t> counts;
  return ++counts[gid];
}

void send(Block* b, size_t off, const void* src, size_t bytes, size_t fill, uint32_t mbar, uint32_t gid, uint32_t clock) {
  auto c = std::make_shared<Copy>();
  c->block = b;
  c->to = b->smem;
  c->off = off;
  c->bytes = bytes;
  c->fill = fill;
  c->from = (const uint8_t*)src;
  c->mbar = mbar - kSharedOrigin;
  c->gid = gid;
  c->clock = clock;
  c->pc = cur->pc;
  take_off(c);
}
}  // namespace

void bulk_g2s(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbar) {
  ZS_ENTER();
  if (bytes == 0 || bytes % 16) fault("argument", "a bulk copy of %u bytes: the size must be a positive multiple of 16", bytes);
  size_t off = shared_offset(dst, bytes, 16, "a bulk copy");
  Block* b = cur->block;
  Mbarrier& m = copy_barrier(b, mbar, "a bulk copy");
  checked(src, bytes, 16, false, Access::async, "a bulk copy");
  check_write(here(), *b->smem, off, bytes, Access::async);
  g.bulk_bytes += bytes;
  uint32_t gid = mbar_gid(b, m.index), clock = engine_clock(gid);
  for (uint32_t done = 0; done < bytes;) {
    uint32_t piece = chance(2) ? bytes - done : std::min<uint32_t>(bytes - done, 16 * (1 + uint32_t(rnd() % (bytes / 16))));
    send(b, off + done, (const uint8_t*)src + done, piece, 0, mbar, gid, clock);
    done += piece;
  }
  yield();
}

void bulk_s2s(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t mbar, uint32_t rank) {
  ZS_ENTER();
  const char* what = "a bulk copy to another block";
  if (bytes == 0 || bytes % 16) fault("argument", "%s of %u bytes: the size must be a positive multiple of 16", what, bytes);
  Block* b = &block_of_cluster(rank, what);
  Region& mine = *cur->block->smem;
  const size_t to = shared_offset(dst, bytes, 16, what), from = shared_offset(src, bytes, 16, what);
  if (b == cur->block && from < to + bytes && to < from + bytes) fault("argument", "%s whose source and destination overlap", what);
  Mbarrier& m = copy_barrier(b, mbar, what);
  const uint32_t gid = mbar_gid(b, m.index), clock = engine_clock(gid);
  check_read_later(here(), mine, from, bytes, gid, clock);
  check_write(here(), *b->smem, to, bytes, Access::async);
  if (b != cur->block) {
    note_foreign(*b, gid, clock, "a bulk copy to it");
    note_foreign(*cur->block, gid, clock, "a bulk copy from it");
  }
  g.bulk_bytes += bytes;
  for (uint32_t done = 0; done < bytes;) {
    uint32_t piece = chance(2) ? bytes - done : std::min<uint32_t>(bytes - done, 16 * (1 + uint32_t(rnd() % (bytes / 16))));
    send(b, to + done, mine.base + from + done, piece, 0, mbar, gid, clock);
    done += piece;
  }
  yield();
}

namespace {
void tensor_to(const std::vector<Block*>& to, const char* what, uint32_t dst, const void* matrix, uint64_t ld, uint32_t rows, uint32_t columns, uint32_t row, uint32_t column,
               uint32_t box, uint32_t mbar) {
  if (uintptr_t(matrix) % 16 || ld % 16) fault("alignment", "%s of a matrix at %p with rows %llu bytes apart: both must be multiples of 16", what, matrix, (unsigned long long)ld);
  if (box == 0 || box > 256) fault("argument", "%s with a box of %u rows", what, box);
  size_t off = shared_offset(dst, box * 128, 1024, what);
  struct Account {
    Block* b;
    uint32_t gid, clock;
  };
  std::vector<Account> accounts;
  for (Block* b : to) {
    Mbarrier& m = copy_barrier(b, mbar, what);
    check_write(here(), *b->smem, off, box * 128, Access::async);
    uint32_t gid = mbar_gid(b, m.index);
    accounts.push_back({b, gid, engine_clock(gid)});
    if (b != cur->block) note_foreign(*b, gid, accounts.back().clock, "a multicast copy to it");
    g.bulk_bytes += box * 128;
  }
  for (uint32_t r = 0; r < box; r++) {
    uint32_t there = row + r < rows && column < columns ? std::min(64u, columns - column) : 0;
    const uint8_t* src = (const uint8_t*)matrix + (row + r) * ld + uint64_t(column) * 2;
    if (there) checked(src, there * 2, 2, false, Access::async, what);
    for (uint32_t c = 0; c < 8; c++) {
      uint32_t bytes = 2 * std::min(8u, there > 8 * c ? there - 8 * c : 0);
      for (const Account& a : accounts) send(a.b, off + r * 128 + ((c ^ (r & 7)) << 4), src + 16 * c, bytes, 16 - bytes, mbar, a.gid, a.clock);
    }
  }
  yield();
}
}  // namespace

void tensor_g2s(uint32_t dst, const void* matrix, uint64_t ld, uint32_t rows, uint32_t columns, uint32_t row, uint32_t column, uint32_t box, uint32_t mbar) {
  ZS_ENTER();
  tensor_to({cur->block}, "a tensor copy", dst, matrix, ld, rows, columns, row, column, box, mbar);
}

void tensor_multicast(uint32_t dst, const void* matrix, uint64_t ld, uint32_t rows, uint32_t columns, uint32_t row, uint32_t column, uint32_t box, uint32_t mbar, uint32_t mask) {
  ZS_ENTER();
  if (!mask || mask >> g.opt.cluster) fault("argument", "a multicast to the blocks %04x of a cluster of %u", mask, g.opt.cluster);
  std::vector<Block*> to;
  for (uint32_t rank = 0; rank < g.opt.cluster; rank++)
    if (mask >> rank & 1) to.push_back(&block_of_cluster(rank, "a multicast copy"));
  tensor_to(to, "a multicast copy", dst, matrix, ld, rows, columns, row, column, box, mbar);
}

}  // namespace zsemu
