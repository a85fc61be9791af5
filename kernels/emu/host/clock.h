// SPDX-License-Identifier: Apache-2.0
// Happens-before, by vector clocks. Every thread (gid) counts its releases; Clocks say up to which count of every gid somebody has synchronised, in four parts:
// what is known; which writes a proxy fence has made visible to the async proxy; with clusters, what is over without being published (reads, which arrivals at
// another block's mbarriers tell of, but not of writes); and which of these reads a proxy fence came behind, in their own block.
// The clocks of one block slot are a piece. Copies share pieces until one of them learns something, since blocks mostly know nothing of each other, and threads
// that leave a barrier together share one immutable view: both together make this affordable.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace zsemu {

enum Part : uint32_t { kKnown, kFenced, kOver, kOverFenced };

class Clocks {
 public:
  bool empty() const { return pieces.empty(); }   // nothing was learnt, or since clear()
  void clear() { *this = {}; }
  uint32_t at(Part part, uint32_t gid) const;
  void raise(Part part, uint32_t gid, uint32_t clock);   // to at least that
  void join(const Clocks& other);
  void join_as_over(const Clocks& other);   // only that it is over: with clusters, whose clocks have all four parts
  void fence();                             // all that is known is visible to the async proxy
  uint64_t version() const { return stamp; }   // of two that have the same the content is the same; not the other way round

 private:
  using Piece = std::shared_ptr<uint32_t[]>;   // null: all zero
  std::vector<Piece> pieces;                   // by slot; the last is the preceding kernel's
  uint64_t stamp = 0;
  void start();
  void changed();
  static uint32_t* own(Piece& p);   // for writing
};
using View = Clocks;
using ViewRef = std::shared_ptr<const View>;
using Gathered = Clocks;

// What a gid is: in each slot the threads come first, then the engines of its mbarriers. The slot after the last is the preceding kernel.
void lay_out_gids(uint32_t resident, uint32_t threads, uint32_t mbarriers, bool clusters);
uint32_t gid_in_slot(uint32_t slot, uint32_t place);
uint32_t slot_of(uint32_t gid);
uint32_t place_in_slot(uint32_t gid);

struct Fiber;
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
