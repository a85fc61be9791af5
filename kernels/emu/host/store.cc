// SPDX-License-Identifier: Apache-2.0
// Copies from shared to global memory. What they read is taken at once, since nobody may write it until the copy is known to have read it; what they write
// lands as that of other copies does, and is nobody's to touch until the thread that asked for it has waited.
#include <algorithm>
#include <cstring>
#include "core.h"

namespace zsemu {

namespace {
void mark_source(const Store& s, bool on) {
  for (size_t i = s.off; i < s.off + s.bytes; i++) {
    Cell& c = cur->block->smem->cells[i];
    c.flags = uint8_t(on ? c.flags | kSource : c.flags & ~kSource);
  }
}

StoreRef start(uint32_t src, uint32_t bytes, uint32_t align, const char* what, std::shared_ptr<std::vector<uint8_t>>& taken) {
  auto s = std::make_shared<Store>();
  Region& smem = *cur->block->smem;
  s->off = shared_offset(src, bytes, align, what);
  s->bytes = bytes;
  check_read(here(), smem, s->off, bytes, Access::async);
  taken = std::make_shared<std::vector<uint8_t>>(smem.base + s->off, smem.base + s->off + bytes);
  return s;
}

void send(Store& s, void* dst, const std::shared_ptr<std::vector<uint8_t>>& taken, size_t from, size_t bytes) {
  auto c = std::make_shared<Copy>();
  c->block = nullptr;
  c->to = find_region(dst);
  c->off = size_t((uint8_t*)dst - c->to->base);
  c->bytes = bytes;
  c->fill = 0;
  c->from = taken->data() + from;
  c->keep = taken;
  c->gid = cur->gid;
  c->clock = cur->clock;
  c->pc = cur->pc;
  take_off(c);
  s.pieces.push_back(c);
}

void check_destination(void* dst, size_t bytes, size_t align, const char* what) {
  Region* r = find_region(dst);
  if (r && r->shared) fault("bounds", "%s to shared memory", what);
  if (uintptr_t(dst) % align) fault("alignment", "%s to %p, which is not aligned to %zu", what, dst, align);
  if (!r || bytes > r->size - size_t((uint8_t*)dst - r->base)) checked(dst, bytes, 1, false, Access::async, what);   // which says what is there
  check_write(here(), *r, size_t((uint8_t*)dst - r->base), bytes, Access::async);
}

void finish(const StoreRef& s) {
  mark_source(*s, true);
  cur->stores.push_back(s);
  cur->block->reading.push_back(s);
  yield();
}

// The running thread knows that the source has been read: from now on it is as if the thread had read it.
void has_read(Store& s) {
  if (s.read) return;
  s.read = true;
  std::vector<StoreRef>& all = cur->block->reading;
  all.erase(std::find_if(all.begin(), all.end(), [&](const StoreRef& o) { return o.get() == &s; }));
  mark_source(s, false);
  Region& smem = *cur->block->smem;
  for (size_t i = s.off; i < s.off + s.bytes; i++) smem.cells[i].flags |= kAsync;   // the async proxy has seen what was written here
  check_read(here(), smem, s.off, s.bytes, Access::async);
  for (const StoreRef& o : all)
    if (o->off < s.off + s.bytes && s.off < o->off + o->bytes) mark_source(*o, true);
}
}  // namespace

void bulk_s2g(void* dst, uint32_t src, uint32_t bytes) {
  ZS_ENTER();
  const char* what = "a bulk copy to global memory";
  if (bytes == 0 || bytes % 16) fault("argument", "%s of %u bytes: the size must be a positive multiple of 16", what, bytes);
  std::shared_ptr<std::vector<uint8_t>> taken;
  StoreRef s = start(src, bytes, 16, what, taken);
  check_destination(dst, bytes, 16, what);
  g.bulk_bytes += bytes;
  for (uint32_t done = 0; done < bytes;) {
    uint32_t piece = chance(2) ? bytes - done : std::min<uint32_t>(bytes - done, 16 * (1 + uint32_t(rnd() % (bytes / 16))));
    send(*s, (uint8_t*)dst + done, taken, done, piece);
    done += piece;
  }
  finish(s);
}

void tensor_s2g(void* matrix, uint64_t ld, uint32_t rows, uint32_t columns, uint32_t row, uint32_t column, uint32_t box, uint32_t src) {
  ZS_ENTER();
  const char* what = "a tensor store";
  if (uintptr_t(matrix) % 16 || ld % 16) fault("alignment", "%s to a matrix at %p with rows %llu bytes apart: both must be multiples of 16", what, matrix, (unsigned long long)ld);
  if (box == 0 || box > 256) fault("argument", "%s with a box of %u rows", what, box);
  std::shared_ptr<std::vector<uint8_t>> taken;
  StoreRef s = start(src, box * 128, 1024, what, taken);
  g.bulk_bytes += box * 128;
  for (uint32_t r = 0; r < box && row + r < rows && column < columns; r++) {
    const uint32_t there = std::min(64u, columns - column);
    uint8_t* to = (uint8_t*)matrix + (row + r) * ld + uint64_t(column) * 2;
    check_destination(to, there * 2, 2, what);
    for (uint32_t c = 0; 8 * c < there; c++) send(*s, to + 16 * c, taken, r * 128 + ((c ^ (r & 7)) << 4), 2 * std::min(8u, there - 8 * c));
  }
  finish(s);
}

void stores_done(uint32_t pending) {
  ZS_ENTER();
  yield();
  std::vector<StoreRef>& all = cur->stores;
  const size_t n = all.size() > pending ? all.size() - pending : 0;
  for (size_t i = 0; i < n; i++) {
    has_read(*all[i]);
    for (const CopyRef& c : all[i]->pieces) {
      land(c);
      settle(*c, cur->gid, cur->clock);
    }
  }
  all.erase(all.begin(), all.begin() + long(n));
}

void stores_read(uint32_t pending) {
  ZS_ENTER();
  yield();
  for (size_t i = 0; i + pending < cur->stores.size(); i++) has_read(*cur->stores[i]);
}

void prefetch(const void* p, uint32_t bytes) {
  ZS_ENTER();
  if (bytes == 0 || bytes % 16) fault("argument", "a prefetch of %u bytes: the size must be a positive multiple of 16", bytes);
  if (uintptr_t(p) % 16) fault("alignment", "a prefetch from %p, which is not aligned to 16", p);
  const Region* r = find_region(p);
  if (!r || r->shared || bytes > r->size - size_t((const uint8_t*)p - r->base)) fault("bounds", "a prefetch of %u bytes at %p, which are not all of one buffer of this launch", bytes, p);
}

}  // namespace zsemu
