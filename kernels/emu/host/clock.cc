// SPDX-License-Identifier: Apache-2.0
#include "clock.h"
#include <algorithm>
#include <utility>
#include "core.h"

namespace zsemu {

namespace {
struct Layout {
  uint32_t stride, slots, parts;   // gids of a slot; slots, with the preceding kernel's
  uint64_t inverse;                // of the stride: exact for gids of 16 bits
} layout;
size_t index(Part part, uint32_t gid) { return part * layout.stride + place_in_slot(gid); }
size_t piece_size() { return size_t(layout.parts) * layout.stride; }

void raise_all(uint32_t* a, const uint32_t* b, size_t n) {
  for (size_t i = 0; i < n; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
}
// Whether any a[i] < b[i].
bool below(const uint32_t* a, const uint32_t* b, size_t n) {
  for (size_t i = 0; i < n;) {
    uint32_t any = 0;
    for (const size_t end = std::min(n, i + 256); i < end; i++) any |= uint32_t(a[i] < b[i]);
    if (any) return true;
  }
  return false;
}
}  // namespace

void lay_out_gids(uint32_t resident, uint32_t threads, uint32_t mbarriers, bool clusters) {
  const uint32_t stride = threads + mbarriers;
  layout = {stride, resident + 1, clusters ? 4u : 2u, ((1ull << 32) + stride - 1) / stride};
}
uint32_t gid_in_slot(uint32_t slot, uint32_t place) { return slot * layout.stride + place; }
uint32_t slot_of(uint32_t gid) { return uint32_t(gid * layout.inverse >> 32); }
uint32_t place_in_slot(uint32_t gid) { return gid - slot_of(gid) * layout.stride; }

void Clocks::start() {
  if (pieces.empty()) pieces.resize(layout.slots);
}

void Clocks::changed() {
  static uint64_t last;
  stamp = ++last;
}

uint32_t* Clocks::own(Piece& p) {
  if (!p) {
    p = Piece(new uint32_t[piece_size()]());
  } else if (p.use_count() > 1) {
    Piece copy(new uint32_t[piece_size()]);
    std::copy_n(p.get(), piece_size(), copy.get());
    p = std::move(copy);
  }
  return p.get();
}

uint32_t Clocks::at(Part part, uint32_t gid) const {
  if (pieces.empty()) return 0;
  const Piece& p = pieces[slot_of(gid)];
  return p ? p[ptrdiff_t(index(part, gid))] : 0;
}

void Clocks::raise(Part part, uint32_t gid, uint32_t clock) {
  start();
  uint32_t& c = own(pieces[slot_of(gid)])[index(part, gid)];
  c = std::max(c, clock);
  changed();
}

void Clocks::join(const Clocks& other) {
  if (other.empty()) return;
  if (empty()) {
    *this = other;
    return;
  }
  for (size_t s = 0; s < pieces.size(); s++) {
    Piece& mine = pieces[s];
    const Piece& theirs = other.pieces[s];
    if (!theirs || mine == theirs || (mine && !below(mine.get(), theirs.get(), piece_size()))) continue;
    if (!mine || !below(theirs.get(), mine.get(), piece_size()))
      mine = theirs;
    else
      raise_all(own(mine), theirs.get(), piece_size());
  }
  changed();
}

void Clocks::join_as_over(const Clocks& other) {
  start();
  const size_t half = piece_size() / 2;   // known and fenced; over and fenced when over
  for (size_t s = 0; s < other.pieces.size(); s++)
    if (other.pieces[s]) {
      uint32_t* over = own(pieces[s]) + half;
      raise_all(over, other.pieces[s].get(), half);
      raise_all(over, other.pieces[s].get() + half, half);
    }
  changed();
}

void Clocks::fence() {
  for (Piece& p : pieces)
    if (p && below(p.get() + layout.stride, p.get(), layout.stride)) {
      uint32_t* c = own(p);
      raise_all(c + layout.stride, c, layout.stride);
    }
  changed();
}

const Clocks& previous_grid() {
  static const Clocks clocks = [] {
    Clocks c;
    c.raise(kKnown, previous_grid_gid(), 1);
    c.raise(kFenced, previous_grid_gid(), 1);
    return c;
  }();
  return clocks;
}

void release_into(Gathered& into, Fiber* f) {
  into.join(*f->view);
  into.raise(kKnown, f->gid, f->clock);
  f->clock++;
}

void release_reads_into(Gathered& into, Fiber* f) {
  into.join_as_over(*f->view);
  into.raise(kOver, f->gid, f->clock);
  f->clock++;
}

void acquire(Fiber* f, const Gathered& from) {
  if (from.empty()) return;
  // Lanes of a warp mostly hold the same view and wait for the same thing: remember the last few results.
  struct Memo {
    ViewRef before, after;
    uint64_t from;
  };
  static Memo memo[4];
  static unsigned turn;
  for (Memo& m : memo)
    if (m.before == f->view && m.from == from.version()) {
      f->view = m.after;
      return;
    }
  auto v = std::make_shared<View>(*f->view);
  v->join(from);
  Memo& m = memo[turn++ % 4];
  m.before = f->view;
  m.from = from.version();
  m.after = f->view = v;
}

void sync_group(const std::vector<Fiber*>& fibers, const Gathered* more) {
  if (fibers.empty()) return;
  auto v = std::make_shared<View>(*fibers[0]->view);
  const View* last = fibers[0]->view.get();
  for (Fiber* f : fibers) {
    if (f->view.get() != last && f->view != fibers[0]->view) {
      last = f->view.get();
      v->join(*last);
    }
  }
  if (more) v->join(*more);
  for (Fiber* f : fibers) v->raise(kKnown, f->gid, f->clock);
  for (Fiber* f : fibers) {
    f->view = v;
    f->clock++;
  }
}

void note_proxy_fence(Fiber* f) {
  auto v = std::make_shared<View>(*f->view);
  v->fence();
  v->raise(kFenced, f->gid, f->clock++);
  f->view = v;
}

bool knows(const View* v, uint32_t self, uint32_t gid, uint32_t clock) { return gid == self || v->at(kKnown, gid) >= clock; }
bool is_over(const View* v, uint32_t self, uint32_t gid, uint32_t clock) {
  return knows(v, self, gid, clock) || (g.opt.cluster > 1 && v->at(kOver, gid) >= clock);
}
bool fenced(const View* v, uint32_t gid, uint32_t clock) { return v->at(kFenced, gid) >= clock; }
bool read_fenced(const View* v, uint32_t gid, uint32_t clock) { return fenced(v, gid, clock) || (g.opt.cluster > 1 && v->at(kOverFenced, gid) >= clock); }

}  // namespace zsemu
