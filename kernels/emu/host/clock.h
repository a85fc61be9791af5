// SPDX-License-Identifier: Apache-2.0
// Happens-before, by vector clocks. Every thread (gid) counts its releases; a View says up to which count of every gid somebody
// has synchronised. A second part of the view says the same of writes that a proxy fence has made visible to the async proxy; a third, with clusters,
// of what is over without being published: reads, which arrivals at another block's mbarriers tell of, but not of writes; a fourth, which of these reads a
// proxy fence came behind, in their own block.
// Threads that leave a barrier together share one immutable view, which is what makes this affordable.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace zsemu {

struct View {
  std::vector<uint32_t> c;   // 2 or 4 * gids
  explicit View(size_t n) : c(n, 0) {}
  View(const View&) = default;
};
using ViewRef = std::shared_ptr<const View>;

struct Fiber;
using Gathered = std::vector<uint32_t>;

void join(Gathered& into, const std::vector<uint32_t>& other);
void release_into(Gathered& into, Fiber* f);              // f's knowledge goes in, and f's clock ticks
void release_reads_into(Gathered& into, Fiber* f);        // only that it is over: with clusters
void acquire(Fiber* f, const Gathered& from);             // f learns it
void sync_group(const std::vector<Fiber*>& fibers, const Gathered* more);   // all learn all, and `more`
void note_proxy_fence(Fiber* f);
bool knows(const View* v, uint32_t self, uint32_t gid, uint32_t clock);
bool is_over(const View* v, uint32_t self, uint32_t gid, uint32_t clock);
bool fenced(const View* v, uint32_t gid, uint32_t clock);
bool read_fenced(const View* v, uint32_t gid, uint32_t clock);

}  // namespace zsemu
