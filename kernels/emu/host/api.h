// SPDX-License-Identifier: Apache-2.0
// What kernel code (through cuda_host.h and ptx_host.h) calls in the emulator. Every function is a scheduling point or a
// checked memory access; none is inline, so the compiler must assume that memory changed behind each call.
#pragma once
#include <cstddef>
#include <cstdint>

namespace zsemu {

struct Idx {
  unsigned x, y, z;
};
Idx thread_idx();
Idx block_idx();
Idx block_dim();
Idx grid_dim();

// Shared memory: the window of the running block, and its 32-bit addresses (never 0, as on a device).
uint8_t* shared_base();
uint32_t shared_addr(const void* p);

// From now on the checks of order and of initialisation leave these bytes of shared memory alone.
void scratch(uint32_t addr, uint32_t bytes);

// Vector accesses by instruction: naturally aligned, or a fault.
void load_shared(void* to, uint32_t addr, uint32_t bytes);
void store_shared(uint32_t addr, const void* from, uint32_t bytes);
void load_global(void* to, const void* p, uint32_t bytes);
void store_global(void* p, const void* from, uint32_t bytes);

// Warp collectives. Lanes named in mask meet; `aligned` ones need the whole warp.
enum class Shuffle { idx, up, down, bfly };
enum class Vote { ballot, any, all };
enum class Reduce { add, min_u, max_u, min_s, max_s, and_, or_, xor_ };
void warp_sync(uint32_t mask);
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, uint32_t arg, uint32_t width);
uint32_t vote(Vote kind, uint32_t mask, bool pred);
uint32_t reduce(Reduce kind, uint32_t mask, uint32_t value);
uint32_t match_any(uint32_t mask, uint64_t value);
void ldmatrix(uint32_t* dst, int count, uint32_t addr, bool transpose);
void stmatrix(const uint32_t* src, int count, uint32_t addr, bool transpose);
void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool fp16);

// Block barriers. threads = 0: the whole block.
void barrier_sync(uint32_t id, uint32_t threads);
void barrier_arrive(uint32_t id, uint32_t threads);
uint32_t barrier_reduce(Vote kind, bool pred);

// mbarriers in shared memory.
void mbarrier_init(uint32_t addr, uint32_t count);
void mbarrier_expect_tx(uint32_t addr, uint32_t bytes);
void mbarrier_arrive(uint32_t addr, uint32_t count);
void mbarrier_wait(uint32_t addr, uint32_t parity);
bool mbarrier_test(uint32_t addr, uint32_t parity);   // false now and then where it has been complete for a moment
void fence_mbarrier_init();
void fence_proxy_async();          // shared memory
void fence_proxy_async_global();

// Asynchronous copies. They land at a random later point, in pieces, in any order; until then the destination is poisoned.
void cp_async(uint32_t dst, const void* src, uint32_t bytes, uint32_t src_bytes);
void cp_async_commit();
void cp_async_wait(uint32_t pending);
void cp_async_mbarrier_arrive(uint32_t addr);   // .noinc
void bulk_g2s(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbar);
// A box of `box` rows of 64 16-bit columns of a matrix whose rows are ld bytes apart, in the 128-byte swizzle, zeros beyond the matrix.
void tensor_g2s(uint32_t dst, const void* matrix, uint64_t ld, uint32_t rows, uint32_t columns, uint32_t row, uint32_t column, uint32_t box, uint32_t mbar);
// The other way, each a group of its own thread. The destination is poisoned until they land.
void bulk_s2g(void* dst, uint32_t src, uint32_t bytes);
void tensor_s2g(void* matrix, uint64_t ld, uint32_t rows, uint32_t columns, uint32_t row, uint32_t column, uint32_t box, uint32_t src);
void stores_done(uint32_t pending);   // all but the last `pending` are written
void stores_read(uint32_t pending);   // their sources may be written again
void prefetch(const void* p, uint32_t bytes);

// Thread-block clusters.
uint32_t cluster_rank();
void cluster_sync();
void cluster_arrive_relaxed();
void cluster_wait();
void mbarrier_arrive_cluster(uint32_t addr, uint32_t rank, uint32_t count);
// From this block's shared memory to dst and mbar in that block's. The source is read as late as the pieces land.
void bulk_s2s(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t mbar, uint32_t rank);
// tensor_g2s into each block of the cluster whose rank is in mask; what lands in one does not wait for what lands in another.
void tensor_multicast(uint32_t dst, const void* matrix, uint64_t ld, uint32_t rows, uint32_t columns, uint32_t row, uint32_t column, uint32_t box, uint32_t mbar, uint32_t mask);

// Warpgroup matrix multiply. a == nullptr: A comes from desc_a, else from registers (four words a lane).
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(uint32_t pending);
void wgmma(float* d, int n, const uint32_t* a, uint64_t desc_a, uint64_t desc_b, bool accumulate, bool fp16);

// Atomics and ordering on global (and shared) memory.
enum class Atomic { add, inc, min_u, max_u, min_s, max_s, and_, or_, xor_, exch, cas, add_f32, load, store };
enum class Order { relaxed, acquire, release, acq_rel };
// `words` 32-bit words as one aligned instruction, which others may see in part.
void load_relaxed(uint32_t* to, const void* p, uint32_t words);
void store_relaxed(void* p, const uint32_t* from, uint32_t words);
uint64_t atomic(Atomic op, Order order, void* p, uint32_t size, uint64_t a, uint64_t b);
void thread_fence();
void griddep_wait();
void griddep_launch();
void sleep();
[[noreturn]] void trap(const char* what);

// One kernel of the program, by name: called with one 8-byte slot per parameter.
struct Entry {
  const char* name;
  void (*call)(const uint64_t* args);
  int params;
  Entry* next;
  Entry(const char* n, void (*c)(const uint64_t*), int p);
};

// A number of the program that tests want to know, such as the shared memory that a variant needs.
struct Constant {
  const char* name;
  long long value;
  Constant* next;
  Constant(const char* n, long long v);
};

}  // namespace zsemu
