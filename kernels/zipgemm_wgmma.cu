// SPDX-License-Identifier: Apache-2.0
// zipgemm on sm_90a: y[n, m] = sum_k x[n, k] * w[m, k] (+ bias[m]), w compressed; BF16 in and out, FP32 sums.
//
// A warpgroup decodes a 64x64 tile together (16 rows a warp, an escape or two a thread) into one of its two swizzled buffers and hands it to
// wgmma; while the tensor cores read that buffer, it decodes the next tile into the other. One more warp brings the compressed tiles with
// their escapes and headers. gemm.cuh says how the work is dealt out.
//
// Launch: block ZS_THREADS, grid <= min(blocks resident at once, units), dynamic shared memory ZS_GEMM_SMEM. workspace: grid * ZS_MW * 64 * ZS_N floats.
// Its bytes are 0xFF before the first launch, and every launch leaves them so. n <= ZS_N.
#define ZS_WGMMA 1

#ifndef ZS_N
#define ZS_N 8  // tokens, rounded up: 8, 16, 32, 64, 128, 256
#endif
#ifndef ZS_MW
#define ZS_MW 2  // warpgroups side by side in m
#endif
#ifndef ZS_KW
#define ZS_KW 2  // warpgroups side by side in k
#endif
#ifndef ZS_STAGES
#define ZS_STAGES 4
#endif
#ifndef ZS_XSTAGES
#define ZS_XSTAGES 4
#endif
#ifndef ZS_BLOCKS
#define ZS_BLOCKS 1  // blocks a multiprocessor
#endif
#define ZS_NTILES (ZS_N / 8)
#define ZS_TEAM 128

#include "activations.cuh"
#include "gemm.cuh"

#define ZS_GROUPS (ZS_MW * ZS_KW)
#define ZS_THREADS (128 * ZS_GROUPS + 32)

// A weight stage: fixed part | the first escapes | tile header.
#define ZS_STAGED_ESCAPES 128u
#define ZS_STAGE_BYTES (ZS_FIXED + 2 * ZS_STAGED_ESCAPES + 16)
#define ZS_STAGE_HEADER (ZS_FIXED + 2 * ZS_STAGED_ESCAPES)

// Shared memory: decoded tiles | activation stages | weight stages | barriers. The first two need 1024-byte alignment.
#define ZS_TILE_SMEM (ZS_GROUPS * 2 * 8192)
#define ZS_RING_SMEM (ZS_GROUPS * ZS_STAGES * ZS_STAGE_BYTES)
#define ZS_BARS ((ZS_GROUPS * ZS_STAGES + ZS_KW * ZS_XSTAGES) * 16)
#define ZS_GEMM_SMEM (ZS_TILE_SMEM + ZS_X_SMEM + ZS_RING_SMEM + ZS_BARS)

// The ring of one warpgroup.
struct Ring {
    uint32_t data, full, empty;  // stages; barriers
    uint32_t stage, parity;
    ZS_DEVICE Ring(uint32_t rings, uint32_t bars, uint32_t group, uint32_t parity_)
        : data(rings + group * (ZS_STAGES * ZS_STAGE_BYTES)), full(bars + group * (16 * ZS_STAGES)), empty(full + 8 * ZS_STAGES), stage(0), parity(parity_) {}
    ZS_DEVICE uint32_t at() const { return data + stage * ZS_STAGE_BYTES; }
    ZS_DEVICE uint32_t full_bar() const { return full + 8 * stage; }
    ZS_DEVICE uint32_t empty_bar() const { return empty + 8 * stage; }
    ZS_DEVICE void next() {
        if (++stage == ZS_STAGES) stage = 0, parity ^= 1;
    }
};

// Starts the copy of a tile's fixed part.
ZS_DEVICE void copy_fixed(const Ring& ring, const uint8_t* fixed) {
    mbarrier_expect_tx(ring.full_bar(), ZS_FIXED);
    bulk_copy_g2s(ring.at(), fixed, ZS_FIXED, ring.full_bar());
}
// Adds the header and the first escapes, and arrives.
ZS_DEVICE void copy_escapes(const Ring& ring, const Blob& blob, uint64_t bits) {
    const TileHeader head(bits);
    st_shared_u32(ring.at() + ZS_STAGE_HEADER, (uint32_t)bits);
    st_shared_u32(ring.at() + ZS_STAGE_HEADER + 4, (uint32_t)(bits >> 32));
    const uint32_t bytes = (min(head.count, ZS_STAGED_ESCAPES) * 2 + 15) & ~15u;
    mbarrier_arrive_expect_tx(ring.full_bar(), bytes);
    if (bytes) bulk_copy_g2s(ring.at() + ZS_FIXED, blob.escapes + (uint64_t)head.offset * 16, bytes, ring.full_bar());
}

// The warp that brings the weights: lane g serves warpgroup g.
ZS_DEVICE void weight_producer(const Blob& blob, const Work& work, uint32_t rings, uint32_t bars, uint32_t lane) {
    if (lane >= ZS_GROUPS) return;
    Ring ring(rings, bars, lane, 1);  // a fresh barrier's previous phase counts as complete
    Cursor at(work, blob, lane / ZS_KW, lane % ZS_KW);
    // The first stages: all the large copies before the first header is looked at.
    Ring first = ring;
    uint64_t heads[ZS_STAGES];
    bool have[ZS_STAGES];
#pragma unroll
    for (uint32_t s = 0; s < ZS_STAGES; s++) {
        have[s] = at.exists(work);
        heads[s] = 0;
        if (have[s]) {
            heads[s] = ld_stream_u64(at.header);
            copy_fixed(ring, at.fixed);
            ring.next();
        }
        at.advance(work, blob);
    }
    Cursor ahead = at;  // headers are read two tiles before they are needed
    uint64_t next = ahead.exists(work) ? ld_stream_u64(ahead.header) : 0;
    ahead.advance(work, blob);
    uint64_t next2 = ahead.exists(work) ? ld_stream_u64(ahead.header) : 0;
#pragma unroll
    for (uint32_t s = 0; s < ZS_STAGES; s++) {
        if (have[s]) {
            copy_escapes(first, blob, heads[s]);
            first.next();
        }
    }
    while (at.left > 0) {
        ahead.advance(work, blob);
        const uint64_t head = next;
        next = next2;
        next2 = ahead.exists(work) ? ld_stream_u64(ahead.header) : 0;
        if (at.exists(work)) {
            mbarrier_wait(ring.empty_bar(), ring.parity);
            copy_fixed(ring, at.fixed);
            copy_escapes(ring, blob, head);
            ring.next();
        }
        at.advance(work, blob);
    }
}

// Escapes of a tile beyond the staged ones, and dense tiles: rare, straight from global memory.
ZS_DEVICE void patch_rest(const Blob& blob, const TileHeader& head, uint32_t tile, uint32_t tid) {
    const uint8_t* list = blob.escapes + (uint64_t)head.offset * 16;
    if (head.dense) {
        patch_dense(list, tile, tid, 128);
        return;
    }
    for (uint32_t i = ZS_STAGED_ESCAPES + tid; i < head.count; i += 128) patch_entry(list, head, i, ((const uint16_t*)list)[i], tile);
}

// Decodes one stage into `tile`; the whole warpgroup. Returns after the escapes are in place for this thread.
ZS_DEVICE void decode_stage(const Ring& ring, const Blob& blob, uint32_t tile, uint32_t barrier, uint32_t tid) {
    const uint32_t stage = ring.at();
    mbarrier_wait(ring.full_bar(), ring.parity);
    const TileHeader head((uint64_t)ld_shared_u32(stage + ZS_STAGE_HEADER) | (uint64_t)ld_shared_u32(stage + ZS_STAGE_HEADER + 4) << 32);
    const uint32_t entry = ld_shared_u16(stage + ZS_FIXED + 2 * tid);
    decode_lane(LaneWords(stage, tid / 32, tid % 32), tile, tid / 32, ZS_HALVES(head.base << 7), tid % 32);
    named_barrier_sync(barrier, 128);  // decoded by all, and the stage has been read by all
    if (tid == 0) mbarrier_arrive(ring.empty_bar());
    if (tid < head.count) patch_entry(blob.escapes + (uint64_t)head.offset * 16, head, tid, entry, tile);
    if (head.count > ZS_STAGED_ESCAPES || head.dense) patch_rest(blob, head, tile, tid);
}

extern "C" __global__ void __launch_bounds__(ZS_THREADS, ZS_BLOCKS)
zs_zipgemm_wgmma(const uint8_t* __restrict__ blob_ptr, const uint16_t* __restrict__ x, uint64_t ldx, const uint16_t* __restrict__ bias, uint16_t* __restrict__ y, uint64_t ldy,
                 uint32_t m, uint32_t k, uint32_t n, float* __restrict__ workspace) {
    ZS_SMEM(smem);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Blob blob(blob_ptr, m, k);
    const Work work(blob);
    const uint32_t tiles = smem_addr(smem), xs = tiles + ZS_TILE_SMEM, rings = xs + ZS_X_SMEM, bars = rings + ZS_RING_SMEM;
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < 2 * ZS_GROUPS * ZS_STAGES; i++) mbarrier_init(bars + 8 * i, 1);
        fence_mbarrier_init();
    }
    const uint32_t group = warp / 4, mw = group / ZS_KW, kw = group % ZS_KW, tid = threadIdx.x % 128;
    Activations acts(x, ldx, n, k, xs, bars + 16 * ZS_GROUPS * ZS_STAGES, mw, kw, tid);
    if (group < ZS_GROUPS) acts.init(mw);
    __syncthreads();
    griddep_launch();

    if (group == ZS_GROUPS) {
        weight_producer(blob, work, rings, bars, lane);  // weights do not depend on the kernel before this one
        return;
    }

    const uint32_t buffers = tiles + group * 2 * 8192;
    Ring ring(rings, bars, group, 0);
    Cursor at(work, blob, mw, kw);
    griddep_wait();
    acts.start(at, work);
    uint32_t buffer = 0, under_way = 0;  // under_way: the barrier of the activations that the wgmma under way reads, or 0
    const Output out = {bias, y, ldy, m, n};
    while (at.left > 0) {
        const int32_t strip_group = at.strip / ZS_MW, last = work.begin + at.left - 1;
        float acc[ZS_N / 2];
#pragma unroll
        for (uint32_t i = 0; i < ZS_N / 2; i++) acc[i] = 0.0f;
        const int32_t units = min(at.kstep + 1, at.left);
        for (int32_t u = 0; u < units; u++) {
            const bool exists = at.exists(work);
            const uint32_t tile = buffers + buffer * 8192;
            if (exists) {
                decode_stage(ring, blob, tile, 1 + group, tid);
                ring.next();
            }
            const uint32_t x_tile = acts.wait();
            fence_proxy_async();  // the decoded tile and the activations were written by ordinary stores
            wgmma_wait<0>();
            wgmma_pin(acc);
            named_barrier_sync(1 + group, 128);
            if (under_way && tid == 0) mbarrier_arrive(under_way);  // all four warps are through with the batch before
            if (exists) {
                const uint64_t a = wgmma_descriptor(tile), b = wgmma_descriptor(x_tile);
                wgmma_pin(acc);
                wgmma_fence();
#pragma unroll
                for (uint32_t j = 0; j < 4; j++) wgmma_m64k16_bf16<ZS_N>(acc, a + 2 * j, b + 2 * j);
                wgmma_commit();
                buffer ^= 1;
            }
            under_way = acts.next();
            acts.fill();
            at.advance(work, blob);
        }
        wgmma_wait<0>();
        wgmma_pin(acc);
        named_barrier_sync(1 + group, 128);
        if (tid == 0) mbarrier_arrive(under_way);
        under_way = 0;
        float pieces[ZS_NTILES][4];
#pragma unroll
        for (uint32_t i = 0; i < ZS_N / 2; i++) pieces[i / 4][i % 4] = acc[i];
        finish<128, ZS_NTILES, 2 * 8192>(pieces, out, work, strip_group, last, tiles, mw, kw, tid, workspace);
    }
}
