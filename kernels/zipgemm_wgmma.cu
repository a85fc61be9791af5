// SPDX-License-Identifier: Apache-2.0
// zipgemm on sm_90a for more tokens: y[n, m] = sum_k x[n, k] * w[m, k] (+ bias[m]), w compressed; BF16 in and out, FP32 sums.
//
// A warpgroup streams the compressed words of its tiles through registers, two tiles ahead. It decodes a 64x64 tile together (16 rows a warp, an
// escape a thread) into one of its two swizzled buffers and hands it to wgmma; while the tensor cores read that buffer, it decodes the next tile
// into the other. gemm.cuh says how the work is dealt out.
//
// Launch: block ZS_THREADS, grid <= min(blocks resident at once, units), dynamic shared memory ZS_GEMM_SMEM. workspace: grid * ZS_MW * 64 * ZS_N floats.
// Its bytes are 0xFF before the first launch, and every launch leaves them so. n <= ZS_N.
#define ZS_WGMMA 1

#ifndef ZS_N
#define ZS_N 128  // tokens, rounded up: 8, 16, 32, 64, 128, 256
#endif
#ifndef ZS_MW
#define ZS_MW 4  // warpgroups side by side in m
#endif
#ifndef ZS_KW
#define ZS_KW 1  // warpgroups side by side in k
#endif
#ifndef ZS_XSTAGES
#define ZS_XSTAGES 2
#endif
#ifndef ZS_BLOCKS
#define ZS_BLOCKS 1  // blocks a multiprocessor
#endif
#define ZS_NTILES (ZS_N / 8)
#define ZS_TEAM 128

#include "activations.cuh"
#include "gemm.cuh"

#define ZS_GROUPS (ZS_MW * ZS_KW)
#define ZS_THREADS (128 * ZS_GROUPS)

// Shared memory: decoded tiles | activation stages | barriers. The first two need 1024-byte alignment.
#define ZS_TILE_SMEM (ZS_GROUPS * 2 * 8192)
#define ZS_GEMM_SMEM (ZS_TILE_SMEM + ZS_X_SMEM + ZS_KW * ZS_XSTAGES * 16)

// This thread's escape of a tile: entry `tid` of its list.
ZS_DEVICE uint32_t load_entry(const uint8_t* thread_escapes, const TileHeader& head, uint32_t tid) {
    return tid < head.count ? *(const uint16_t*)(thread_escapes + (uint64_t)head.offset * 16) : 0;
}

// Puts the escapes into the decoded tile; the whole warpgroup, which has met since the decode.
ZS_DEVICE void patch_tile(const uint8_t* escapes, const TileHeader& head, uint32_t entry, uint32_t tile, uint32_t tid) {
    const uint8_t* list = escapes + (uint64_t)head.offset * 16;
    if (tid < head.count) patch_entry(list, head, tid, entry, tile);
    if (head.count > 128)
        for (uint32_t i = 128 + tid; i < head.count; i += 128) patch_entry(list, head, i, ((const uint16_t*)list)[i], tile);
    if (head.dense) patch_dense(list, tile, tid, 128);
}

extern "C" __global__ void __launch_bounds__(ZS_THREADS, ZS_BLOCKS)
zs_zipgemm_wgmma(const uint8_t* __restrict__ blob_ptr, const uint16_t* __restrict__ x, uint64_t ldx, const uint16_t* __restrict__ bias, uint16_t* __restrict__ y, uint64_t ldy,
                 uint32_t m, uint32_t k, uint32_t n, float* __restrict__ workspace) {
    ZS_SMEM(smem);
    const uint32_t group = threadIdx.x / 128, mw = group / ZS_KW, kw = group % ZS_KW, tid = threadIdx.x % 128, warp = tid / 32, lane = tid % 32;
    const Blob blob(blob_ptr, m, k);
    const Work work(blob);
    const uint32_t tiles = smem_addr(smem), xs = tiles + ZS_TILE_SMEM, buffers = tiles + group * 2 * 8192;
    griddep_launch();

    // Weights do not depend on the kernel before this one: start their loads before anything else. Of the two tiles after the present one the words are
    // under way, of the first also the escapes, of the second the header.
    const uint8_t* thread_escapes = blob.escapes + 2 * tid;
    pin(thread_escapes);
    Cursor at(work, blob, mw, kw), ahead = at;  // ahead: two tiles further on, in the loop
    LaneWords now, next;
    uint64_t head_bits = 0, next_bits = 0;
    if (ahead.exists(work)) {
        head_bits = ld_stream_u64(ahead.header);
        now = LaneWords(ahead.fixed, warp, lane);
    }
    ahead.advance(work, blob);
    if (ahead.exists(work)) {
        next_bits = ld_stream_u64(ahead.header);
        next = LaneWords(ahead.fixed, warp, lane);
    }
    ahead.advance(work, blob);
    TileHeader head(head_bits);
    uint32_t entry = load_entry(thread_escapes, head, tid);

    Activations acts(x, ldx, n, k, xs, xs + ZS_X_SMEM, mw, kw, tid);
    acts.init(mw);
    __syncthreads();
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
            if (exists) decode_lane(now, tile, warp, ZS_HALVES(head.base << 7), lane);
            if (exists) {
                named_barrier_sync(1 + group, 128);
                patch_tile(blob.escapes, head, entry, tile, tid);
            }
            head = TileHeader(next_bits), entry = load_entry(thread_escapes, head, tid);
            now = next;
            next_bits = 0;
            if (ahead.exists(work)) {
                next_bits = ld_stream_u64(ahead.header);
                next = LaneWords(ahead.fixed, warp, lane);
            }
            ahead.advance(work, blob);
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
