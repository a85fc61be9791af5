// SPDX-License-Identifier: Apache-2.0
// The emulator's own structures. One CUDA thread is one fiber; all fibers of a launch run on one host thread.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <vector>
#include "api.h"
#include "clock.h"

extern "C" char __executable_start, end;   // from the linker: the program's own memory

namespace zsemu {

constexpr uint32_t kNone = 0xFFFFFFFFu;
constexpr uint32_t kSharedOrigin = 1024;   // shared addresses start here, so that 0 is never one
constexpr uint32_t kMaxMbarriers = 96;     // of one block
constexpr uint32_t kMaxCluster = 8;        // blocks: more need leave of the driver
constexpr uint8_t kPoison = 0xFF;          // NaN as BF16, FP16 and FP32; an absurd index as an integer

struct Block;
struct Warp;
struct Fiber;
std::string format(const char* fmt, ...) __attribute__((format(printf, 1, 2)));

// ---- what one byte of checked memory remembers (clock.h explains gid and clock)
struct Cell {
  uint32_t wclk, rclk;   // clock of the last write and of the last read
  uint32_t wpc, rpc;     // code addresses of them
  uint16_t wgid, rgid;   // who
  uint32_t more;         // further readers: index in the table of read sets, 0 = none
  uint8_t flags;
};
enum : uint8_t {
  kInit = 1,      // has a value
  kFlight = 2,    // an asynchronous copy into it is not yet waited for
  kMbar = 4,      // part of an mbarrier
  kAtomic = 8,    // the last write was atomic
  kAsync = 16,    // the last write was made by the async proxy, or is known to it
  kScratch = 32,  // declared to be nobody's
  kSource = 64,   // a copy to global memory may still read it
  kPlainRead = 128,   // the last read was not by the async proxy
};
constexpr uint16_t kNobody = 0xFFFF;

struct Region {
  std::string name;
  uint8_t* base = nullptr;
  size_t size = 0;
  bool writable = false, dependent = false, shared = false;
  Cell* cells = nullptr;   // null for read-only memory
  bool holds(const void* p) const { return (const uint8_t*)p >= base && (const uint8_t*)p < base + size; }
};
enum class Access { plain, atomic, async };

// Whoever an access is accounted to: a thread now, or a thread at the moment when it issued asynchronous work.
struct Actor {
  uint32_t gid, clock;
  const View* view;
  uint32_t pc;
};
void check_read(const Actor& who, Region& r, size_t off, size_t n, Access kind);
// The same, of a copy that reads later: until its account is known to be over, nobody may write there.
void check_read_later(const Actor& who, Region& r, size_t off, size_t n, uint32_t gid, uint32_t clock);
void check_write(const Actor& who, Region& r, size_t off, size_t n, Access kind);
void mark_written(Region& r, size_t off, size_t n, uint32_t gid, uint32_t clock, uint32_t pc, uint8_t flags);
Region* find_region(const void* p);
Region* add_region(Region r);
uint8_t* map_guarded(size_t size, size_t align, bool exact_align);
// A checked access of a runtime function (not of compiled code) by the running thread.
Region& checked(const void* p, size_t n, size_t align, bool write, Access kind, const char* what);

// ---- asynchronous copies
struct Copy {
  Block* block;
  Region* to;
  size_t off, bytes, fill;      // fill: zero bytes after `bytes`
  const uint8_t* from;
  uint32_t mbar = kNone;        // shared offset of the mbarrier that counts the bytes; kNone: cp.async
  uint32_t gid = 0, clock = 0;  // its account
  uint32_t pc = 0;
  bool landed = false, settled = false;   // settled: somebody has waited for it
  std::shared_ptr<std::vector<uint8_t>> keep;   // to global memory: what was read, of no block
  // An arrival at an mbarrier instead of a copy: when these have landed.
  std::vector<std::shared_ptr<Copy>> after;
  Gathered knowledge;
};
using CopyRef = std::shared_ptr<Copy>;
void take_off(const CopyRef& c);
void settle(Copy& c, uint32_t gid, uint32_t clock);
size_t shared_offset(uint32_t addr, uint32_t bytes, uint32_t align, const char* what);
bool land_one();                       // lands a random piece; false when nothing is in flight
void land(const CopyRef& c);           // lands it now
bool block_has_flight(const Block* b);
void forget_copies(const Block* b);
void cp_async_then_arrive(uint32_t mbar_off);

// A copy from shared to global memory, in pieces, and what it reads.
struct Store {
  std::vector<CopyRef> pieces;
  size_t off, bytes;
  bool read = false;   // somebody has waited until it was
};
using StoreRef = std::shared_ptr<Store>;

// ---- mbarriers and barriers
struct Mbarrier {
  uint32_t count = 0, pending = 0, phase = 0, index = 0;
  int64_t tx = 0;
  bool fenced = false;   // the initialisation is visible to the async proxy
  Actor init{};
  Gathered gathered, released;   // what arrivals of the current / last completed phase knew
  std::vector<Fiber*> waiters;
};
void fence_own_mbarriers();
void arrive_for(Block* b, uint32_t off, const Gathered& knowledge);
void arrive_in(Block& b, uint32_t off, uint32_t count);   // the running thread's, in any block of its cluster
void complete_tx(Block* b, uint32_t off, uint32_t bytes, uint32_t gid, uint32_t clock);

struct Barrier {
  uint32_t arrived = 0, expected = 0;
  std::vector<Fiber*> waiting;
  Gathered gathered;
  uint32_t votes_count = 0;
};

// ---- fibers, warps, blocks
struct Slot {   // a lane that waits in a collective
  int kind = 0;
  uint32_t mask = 0;
  void* data = nullptr;
};
struct Wgmma {
  float* d[32];
  uint32_t a[32][4];
  bool from_regs, accumulate, fp16;
  int n;
  uint64_t desc_a, desc_b;
  Actor issue;
  Fiber* reader;
  ViewRef keep;
};
struct Warp {
  Block* block;
  uint32_t id = 0, ready = 0, live = 0;
  int64_t prio = 0;
  uint32_t pos = kNone;      // place in the list of warps that can run
  Fiber* lane[32] = {};
  Slot slot[32];
  std::vector<std::vector<Wgmma>> groups;   // committed, oldest first
  std::vector<Wgmma> open;
  std::map<float*, std::vector<float>> held;   // accumulators that are being computed
};
struct CopyGroup {
  std::vector<CopyRef> copies;
};
// What a thread waits for, written out only if a deadlock is to be reported. The texts are literals.
struct Waiting {
  const char* what = nullptr;      // null: nothing
  const char* details = "";        // a format of `numbers`: nothing but %ll
  unsigned long long numbers[6] = {};
  std::string text() const { return what + format(details, numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]); }
};
struct Fiber {
  void* sp = nullptr;
  uint8_t* stack = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint32_t lane = 0, tid = 0;
  Idx idx{};
  uint32_t gid = 0, clock = 1;
  ViewRef view;
  Gathered release_fence, acquire_pending;   // what the last __threadfence released; what relaxed reads saw, until the next
  uint32_t pc = 0;
  bool done = false, wgmma_fenced = false;
  bool at_cluster = false;    // has arrived at the cluster's barrier, in this phase, and not waited yet
  uint32_t cluster_phase = 0;
  Waiting waits;
  std::vector<CopyGroup> groups;
  CopyGroup open;
  std::vector<StoreRef> stores;   // oldest first
  ViewRef global_fence;           // what it knew at its last fence_proxy_async_global
  uint32_t global_fence_clock = 0;
  uint32_t votes[2] = {};
  uint32_t polls = 0;         // atomic loads in a row
};
// Something that another block of the cluster did to this one's shared memory, which must be known to be over before this one ends.
struct Foreign {
  uint32_t gid, clock, by, pc;   // its account, who asked for it
  const char* what;
};
// The blocks that run together. Without clusters every block is one.
struct Cluster {
  std::vector<Block*> blocks;    // by rank; null: ended
  uint32_t live = 0, arrived = 0, phase = 0;   // threads; of its barrier
  Gathered gathered, released;
  std::vector<Fiber*> waiting;
};
struct Block {
  Idx idx{};
  Cluster* cluster = nullptr;
  uint32_t rank = 0;
  std::vector<Foreign> foreign;
  uint32_t slot = 0, live = 0, copies = 0;
  Region* smem = nullptr;
  std::vector<Fiber> threads;
  std::vector<Warp> warps;
  Barrier barriers[16];
  std::map<uint32_t, Mbarrier> mbars;
  std::vector<StoreRef> reading;   // its shared memory
};

// ---- the launch
struct Options {
  uint64_t seed = 1;
  Idx grid{1, 1, 1}, block{32, 1, 1};
  size_t shared = 0;
  uint32_t resident = 0, cluster = 1;   // blocks
  bool races = true, strict_init = true, pdl = false;
};
struct Launch {
  Options opt;
  Entry* entry = nullptr;
  std::vector<uint64_t> args;
  uint32_t threads = 0, resident = 0;   // threads of a block; blocks alive at once
  uint64_t switches = 0, collectives = 0, copies = 0, bulk_bytes = 0, matrices = 0, conflicts = 0;
};
extern Launch g;
extern Fiber* cur;
inline uint32_t mbar_gid(const Block* b, uint32_t index) { return gid_in_slot(b->slot, g.threads + index); }
inline uint32_t previous_grid_gid() { return gid_in_slot(g.resident, 0); }
inline bool is_engine(uint32_t gid) { return place_in_slot(gid) >= g.threads; }
const Clocks& previous_grid();   // that the preceding kernel is over
Block& block_of_cluster(uint32_t rank, const char* what);   // a fault where there is none
void note_foreign(Block& b, uint32_t gid, uint32_t clock, const char* what);
void cluster_thread_ended(Fiber& f);
void leave_cluster(Block& b);   // with the checks of what others did to it
bool knows_init(const View* v, uint32_t self, const Mbarrier& m);
inline Actor here() { return Actor{cur->gid, cur->clock, cur->view.get(), cur->pc}; }
std::string thread_name(uint32_t gid);

void run_launch();
void yield();          // let others run
void spin_yield();     // the same, for a thread that polls
void suspend();        // until wake()
void wake(Fiber* f);
void resume(Fiber* f);   // the same, where nothing happened that a poller may see
void progress();       // something happened that a poller may see
uint64_t rnd();
inline bool chance(uint32_t one_in) { return one_in && rnd() % one_in == 0; }
[[noreturn]] void fault(const char* kind, const char* fmt, ...) __attribute__((format(printf, 2, 3)));

// Code addresses are kept relative to the program's start, as addr2line wants them.
#define ZS_ENTER() (::zsemu::cur->pc = uint32_t(uintptr_t(__builtin_return_address(0)) - uintptr_t(&__executable_start)))

}  // namespace zsemu
