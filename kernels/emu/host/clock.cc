// SPDX-License-Identifier: Apache-2.0
#include "clock.h"
#include <algorithm>
#include "core.h"

namespace zsemu {

void join(Gathered& into, const std::vector<uint32_t>& other) {
  if (into.empty()) {
    into = other;
    return;
  }
  uint32_t* a = into.data();
  const uint32_t* b = other.data();
  for (size_t i = 0, n = std::min(into.size(), other.size()); i < n; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
}

void release_into(Gathered& into, Fiber* f) {
  join(into, f->view->c);
  into[f->gid] = std::max(into[f->gid], f->clock);
  f->clock++;
}

void release_reads_into(Gathered& into, Fiber* f) {
  const std::vector<uint32_t>& c = f->view->c;
  const size_t n = g.gids;
  if (into.empty()) into.assign(view_size(), 0);
  for (size_t i = 0; i < n; i++) {
    into[2 * n + i] = std::max({into[2 * n + i], c[i], c[2 * n + i]});
    into[3 * n + i] = std::max({into[3 * n + i], c[n + i], c[3 * n + i]});
  }
  into[2 * n + f->gid] = std::max(into[2 * n + f->gid], f->clock);
  f->clock++;
}

void acquire(Fiber* f, const Gathered& from) {
  if (from.empty()) return;
  // Lanes of a warp mostly hold the same view and wait for the same thing: remember the last few results.
  struct Memo {
    ViewRef before, after;
    Gathered from;
  };
  static Memo memo[4];
  static unsigned turn;
  for (Memo& m : memo)
    if (m.before == f->view && m.from == from) {
      f->view = m.after;
      return;
    }
  auto v = std::make_shared<View>(*f->view);
  join(v->c, from);
  Memo& m = memo[turn++ % 4];
  m.before = f->view;
  m.from = from;
  m.after = f->view = v;
}

void sync_group(const std::vector<Fiber*>& fibers, const Gathered* more) {
  if (fibers.empty()) return;
  auto v = std::make_shared<View>(*fibers[0]->view);
  const View* last = fibers[0]->view.get();
  for (Fiber* f : fibers) {
    if (f->view.get() != last && f->view != fibers[0]->view) {
      last = f->view.get();
      join(v->c, last->c);
    }
  }
  if (more && !more->empty()) join(v->c, *more);
  for (Fiber* f : fibers) v->c[f->gid] = std::max(v->c[f->gid], f->clock);
  for (Fiber* f : fibers) {
    f->view = v;
    f->clock++;
  }
}

void note_proxy_fence(Fiber* f) {
  auto v = std::make_shared<View>(*f->view);
  size_t n = g.gids;
  for (size_t i = 0; i < n; i++) v->c[n + i] = std::max(v->c[n + i], v->c[i]);
  v->c[n + f->gid] = f->clock++;
  f->view = v;
}

bool knows(const View* v, uint32_t self, uint32_t gid, uint32_t clock) { return gid == self || v->c[gid] >= clock; }
bool is_over(const View* v, uint32_t self, uint32_t gid, uint32_t clock) {
  return knows(v, self, gid, clock) || (g.opt.cluster > 1 && v->c[2 * size_t(g.gids) + gid] >= clock);
}
bool fenced(const View* v, uint32_t gid, uint32_t clock) { return v->c[g.gids + gid] >= clock; }
bool read_fenced(const View* v, uint32_t gid, uint32_t clock) { return fenced(v, gid, clock) || (g.opt.cluster > 1 && v->c[3 * size_t(g.gids) + gid] >= clock); }

}  // namespace zsemu
