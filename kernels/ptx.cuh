// SPDX-License-Identifier: Apache-2.0
// Each PTX instruction that the kernels use is one small named function here. kernels/emu has a host twin of each, so
// that the same kernels run on a CPU in the tests.
#pragma once

#ifdef ZS_EMU
#include "emu/ptx_host.h"
#else

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;

#define ZS_DEVICE __device__ __forceinline__

// All dynamic shared memory of the block. 1024-byte alignment is what the 128-byte swizzle of wgmma needs.
#define ZS_SMEM(name)                                  \
    extern __shared__ __align__(1024) uint8_t zs_smem_[]; \
    uint8_t* const name = zs_smem_

// Shared-memory addresses are 32-bit in PTX.
ZS_DEVICE uint32_t smem_addr(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// ---- bit work: one integer instruction each -------------------------------------------------------------------------

// mask ? b : a, bit by bit.
ZS_DEVICE uint32_t select_bits(uint32_t a, uint32_t b, uint32_t mask) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xD8;" : "=r"(d) : "r"(a), "r"(b), "r"(mask));
    return d;
}

// (a & mask) | c.
ZS_DEVICE uint32_t and_or(uint32_t a, uint32_t mask, uint32_t c) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(c));
    return d;
}

// Byte i of the result is byte (sel >> 4 i) & 7 of b:a.
ZS_DEVICE uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t sel) {
    uint32_t d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(sel));
    return d;
}

// a * b + c on the FMA pipe, which the decode leaves free otherwise. (asm, so that the compiler does not turn it into shifts and adds on the integer pipe.)
ZS_DEVICE uint32_t mad_lo(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// Two floats to two BF16, round to nearest even; lo in the low half.
ZS_DEVICE uint32_t pack_bf16(float lo, float hi) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    return d;
}

// ---- global memory --------------------------------------------------------------------------------------------------

struct Vec4 {
    uint32_t x, y, z, w;
};

// Weights are read once: keep them out of L1 and let L2 drop them first.
ZS_DEVICE uint32_t ld_stream_u16(const void* p) {
    uint16_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(p));
    return v;
}
ZS_DEVICE uint32_t ld_stream_u32(const void* p) {
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
ZS_DEVICE uint64_t ld_stream_u64(const void* p) {
    uint64_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u64 %0, [%1];" : "=l"(v) : "l"(p));
    return v;
}
ZS_DEVICE Vec4 ld_stream_v4(const void* p) {
    Vec4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
ZS_DEVICE Vec4 ld_global_v4(const void* p) {
    Vec4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
ZS_DEVICE void st_global_v4(void* p, Vec4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
ZS_DEVICE void st_global_v2(void* p, uint32_t x, uint32_t y) { asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(x), "r"(y) : "memory"); }
// Results that nobody reads soon.
ZS_DEVICE void st_stream_v4(void* p, Vec4 v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Between blocks of one grid: each word is seen whole, in no order with others.
ZS_DEVICE Vec4 ld_relaxed_v4(const void* p) {
    Vec4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
ZS_DEVICE void st_relaxed_v4(void* p, Vec4 v) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// Counters between blocks.
ZS_DEVICE uint32_t ld_acquire_u32(const uint32_t* p) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
// What this thread has written, or knows of, is seen by those who acquire what it adds or stores later.
ZS_DEVICE void fence_release() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
ZS_DEVICE void red_add_relaxed(uint32_t* p, uint32_t v) { asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
// Adds 1; from `limit` on, or beyond it, to 0. (Where the compiler sees an addition it makes one for all lanes, with a shuffle of its result, which waits for it.)
ZS_DEVICE uint32_t atom_inc_relaxed(uint32_t* p, uint32_t limit) {
    uint32_t d;
    asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(d) : "l"(p), "r"(limit) : "memory");
    return d;
}
ZS_DEVICE uint32_t atom_add_acq_rel(uint32_t* p, uint32_t v) {
    uint32_t d;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(d) : "l"(p), "r"(v) : "memory");
    return d;
}

// ---- shared memory --------------------------------------------------------------------------------------------------

ZS_DEVICE Vec4 ld_shared_v4(uint32_t addr) {
    Vec4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(addr) : "memory");
    return v;
}
ZS_DEVICE uint32_t ld_shared_u16(uint32_t addr) {
    uint16_t v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(addr) : "memory");
    return v;
}
ZS_DEVICE void st_shared_v4(uint32_t addr, Vec4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
ZS_DEVICE uint32_t ld_shared_u32(uint32_t addr) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(addr) : "memory");
    return v;
}
ZS_DEVICE void st_shared_u32(uint32_t addr, uint32_t v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(addr), "r"(v) : "memory"); }
ZS_DEVICE void st_shared_u16(uint32_t addr, uint32_t v) {
    asm volatile("{ .reg .b16 h; cvt.u16.u32 h, %1; st.shared.b16 [%0], h; }" ::"r"(addr), "r"(v) : "memory");
}

// Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
ZS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr)
                 : "memory");
}

// Four 8x8 matrices of 16-bit values, row l / 4, columns 2 (l mod 4) and the next in lane l, each transposed: lane l gives the address of column l % 8 of matrix l / 8. sm_90
ZS_DEVICE void store_matrices_transposed(uint32_t addr, const Vec4& v) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// An 8x8 matrix of 16-bit values, row l / 4, columns 2 (l mod 4) and the next in lane l: transposed.
ZS_DEVICE uint32_t transpose_8x8(uint32_t v) {
    uint32_t d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(v));
    return d;
}

// ---- tensor cores ---------------------------------------------------------------------------------------------------

// d[16x8] += a[16x16] * b[16x8], BF16 in, FP32 sums.
ZS_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- asynchronous copies, sm_80 -------------------------------------------------------------------------------------

ZS_DEVICE void cp_async_16(uint32_t dst, const void* src) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory"); }
// Reads src_bytes, 0 to 16, and writes zeros behind them.
ZS_DEVICE void cp_async_16_zfill(uint32_t dst, const void* src, uint32_t src_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(src_bytes) : "memory");
}
ZS_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of this thread's groups are under way.
template <int N>
ZS_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// Arrives on the barrier once all of this thread's earlier cp.async are complete; the thread goes on at once.
ZS_DEVICE void cp_async_mbarrier_arrive(uint32_t bar) { asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bar) : "memory"); }

// ---- mbarrier -------------------------------------------------------------------------------------------------------

ZS_DEVICE void mbarrier_init(uint32_t bar, uint32_t count) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory"); }
ZS_DEVICE void mbarrier_arrive(uint32_t bar) { asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(bar) : "memory"); }
// Waits until the phase of the given parity is complete.
ZS_DEVICE void mbarrier_wait(uint32_t bar, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred p;\n"
        "again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
        "@!p bra again; }" ::"r"(bar),
        "r"(parity)
        : "memory");
#else
    asm volatile(
        "{ .reg .pred p;\n"
        "again: mbarrier.test_wait.parity.shared.b64 p, [%0], %1;\n"
        "@!p bra again; }" ::"r"(bar),
        "r"(parity)
        : "memory");
#endif
}

#if __CUDA_ARCH__ >= 900
// Whether that phase is complete.
ZS_DEVICE bool mbarrier_test(uint32_t bar, uint32_t parity) {
    uint32_t done;
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    return done;
}
// As `count` arrivals.
ZS_DEVICE void mbarrier_arrive(uint32_t bar, uint32_t count) {
    asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0], %1; }" ::"r"(bar), "r"(count) : "memory");
}
ZS_DEVICE void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
    asm volatile("{ .reg .b64 t; mbarrier.arrive.expect_tx.shared.b64 t, [%0], %1; }" ::"r"(bar), "r"(bytes) : "memory");
}
// Makes the initialised barriers visible to the copy engine.
ZS_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Orders this thread's shared-memory accesses, and those of others that it has acquired, before later ones of the copy engine and of wgmma.
ZS_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Orders what this thread has acquired in global memory before later reads of it by the copy engine.
ZS_DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
// `bytes` (a multiple of 16) that follow each other, from global to shared memory, completing on the barrier; and from shared to global memory.
ZS_DEVICE void bulk_copy_g2s(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst), "l"(src), "r"(bytes), "r"(bar) : "memory");
}
ZS_DEVICE void bulk_copy_s2g(void* dst, uint32_t src, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(dst), "r"(src), "r"(bytes) : "memory");
}
// Waits until this thread's copies to global memory have been written, but for the last N.
template <int N>
ZS_DEVICE void bulk_copies_done() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
// Waits until all of them have been read from shared memory.
ZS_DEVICE void bulk_copies_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// Brings bytes (a multiple of 16) to L2.
ZS_DEVICE void prefetch_l2(const void* p, uint32_t bytes) { asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory"); }
// A matrix in global memory as the copy engine sees it (a CUtensorMap), and what it was made from.
struct __align__(64) TensorMap {
    uint64_t opaque[16];
};
struct TensorRows {
    const uint16_t* data;
    uint64_t ld;  // elements from one row to the next
    uint32_t rows, columns;
    uint32_t box;           // rows of a copy
    uint32_t matrices = 1;  // such ones, one behind the other
};
// Brings a map to where the copy engine looks for it.
ZS_DEVICE void prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }
// A box of rows of 64 BF16 from (row, column) on, in the 128-byte swizzle, zeros beyond the matrix; completes on the barrier with all box * 128 bytes.
ZS_DEVICE void tensor_copy(uint32_t dst, const TensorMap& map, const TensorRows&, uint32_t column, uint32_t row, uint32_t bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(dst), "l"(&map), "r"(column), "r"(row),
                 "r"(bar)
                 : "memory");
}
// The other way, into one of several such matrices: what lies within it, if there is this one. One of this thread's copies to global memory (bulk_copies_done).
ZS_DEVICE void tensor_store(const TensorMap& map, const TensorRows&, uint32_t column, uint32_t row, uint32_t matrix, uint32_t src) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];\ncp.async.bulk.commit_group;" ::"l"(&map), "r"(column), "r"(row), "r"(matrix),
                 "r"(src)
                 : "memory");
}
// ---- thread-block clusters: shared addresses are of the block's own memory, and name the same place in every block of its cluster ----

ZS_DEVICE uint32_t cluster_rank() {
    uint32_t d;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(d));
    return d;
}
// A barrier of all threads of the cluster, in whole warps; those that have ended count as arrived. What was written before is seen by the others after:
// it waits for that, and empties the L1 cache.
ZS_DEVICE void cluster_sync() { asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// The same in two steps, without waiting for what was written: of that the others see mbarriers that were initialised before a fence_mbarrier_init, no more.
ZS_DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
ZS_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Arrives at the barrier in the block of that rank, which must not have ended. It says that this thread, and those that it has synchronised with, have
// read what they have read of their shared memory, so that copies may land there; what they have written it does not publish. (.release.cluster would,
// and an .acquire.cluster in the wait: a MEMBAR.GPU before each arrival and an L1 cache emptied after each wait.)
ZS_DEVICE void mbarrier_arrive_cluster(uint32_t bar, uint32_t rank, uint32_t count = 1) {
    asm volatile(
        "{ .reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there], %2; }" ::"r"(bar),
        "r"(rank), "r"(count)
        : "memory");
}
// `bytes` (a multiple of 16) of this block's shared memory to dst in the block of that rank, completing on its barrier at bar there.
ZS_DEVICE void bulk_copy_to_block(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar, uint32_t rank) {
    asm volatile(
        "{ .reg .b32 there, tells;\n"
        "mapa.shared::cluster.u32 there, %0, %4;\n"
        "mapa.shared::cluster.u32 tells, %3, %4;\n"
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [there], [%1], %2, [tells]; }" ::"r"(dst),
        "r"(src), "r"(bytes), "r"(bar), "r"(rank)
        : "memory");
}
// tensor_copy into every block whose rank is a bit of the mask: to dst in its memory, completing on its own barrier at bar.
ZS_DEVICE void tensor_copy_multicast(uint32_t dst, const TensorMap& map, const TensorRows&, uint32_t column, uint32_t row, uint32_t bar, uint16_t mask) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(dst), "l"(&map),
                 "r"(column), "r"(row), "r"(bar), "h"(mask)
                 : "memory");
}

// A whole warpgroup's registers a thread, more or fewer than it was launched with.
template <int N>
ZS_DEVICE void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
ZS_DEVICE void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
// Programmatic dependent launch: wait for the kernel before this one; let the one after this start its prologue.
ZS_DEVICE void griddep_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
ZS_DEVICE void griddep_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
ZS_DEVICE void fence_mbarrier_init() {}
ZS_DEVICE void fence_proxy_async() {}
ZS_DEVICE void griddep_wait() {}
ZS_DEVICE void griddep_launch() {}
#endif

// ---- barriers -------------------------------------------------------------------------------------------------------

// Barrier `id` (1..15) among `threads` threads of the block, whole warps.
ZS_DEVICE void named_barrier_sync(uint32_t id, uint32_t threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// 2^v and 1 / v, the hardware's; values and results below 2^-126 are 0.
ZS_DEVICE float exp2_approx(float v) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(v));
    return v;
}
ZS_DEVICE float reciprocal_approx(float v) {
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(v));
    return v;
}

// Ends the kernel as a failed assertion of the device, the error that nn.Embedding gives for such an index.
ZS_DEVICE void fail_index() { __assertfail("an index is not a row of the table", "zipserv/kernels/gather.cu", 0, "zs_gather", 1); }

// Bytes that nobody reads: told to the emulator, nothing on a GPU.
ZS_DEVICE void scratch_bytes(uint32_t addr, uint32_t bytes) {}

// Lets so many clocks go by.
ZS_DEVICE void pause_clocks(uint32_t clocks) {
    const uint32_t start = (uint32_t)clock();
    while ((uint32_t)clock() - start < clocks) {}
}

// Keeps a pointer in registers, where the compiler would compute it anew at every use.
ZS_DEVICE void pin(const uint8_t*& p) { asm volatile("" : "+l"(p)); }

#endif  // ZS_EMU

#ifdef ZS_WGMMA
#include "wgmma.cuh"
#endif
