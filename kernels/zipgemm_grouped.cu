// SPDX-License-Identifier: Apache-2.0
// zipgemm_grouped: y[pair, m] = sum_k x[row of the pair, k] * w[expert of the pair][m, k] for all experts that were hit, in one launch; w compressed, BF16 in and out,
// FP32 sums. sm_80 and later. The rows of x are tokens or, with by_token = 0, pairs.
//
// It is zipgemm_mma over items instead of one weight (grouped.cuh): which experts those are, the router's kernels have written to device memory. So the host knows
// nothing of it and a CUDA graph can hold it. Limit: the bytes of the experts that were hit; those of one with more than ZS_N pairs once for every ZS_N.
//
// With ZS_GATED the upper half of the rows of w are gates, m is a multiple of 128, and y[pair, m / 2] = silu(gate) * up, rounded where separate kernels would.
//
// The blobs of all experts lie `step` bytes apart, 16-byte aligned, and are tiled: no header is read, so callers refuse raw ones. x [.., k] and y [pairs, m] have no gaps.
//
// Launch: block ZS_THREADS, grid <= blocks resident at once, dynamic shared memory ZS_GEMM_SMEM. workspace: grid * ZS_MW * 64 * ZS_N floats.
// Its bytes are 0xFF before the first launch, and every launch leaves them so. It may be launched early (programmatic dependent launch); which weights it
// needs the kernel ahead of it may be about to write, so it waits for that before anything else.

#ifndef ZS_N
#define ZS_N 8  // pairs of an item, rounded up: 8, 16, 32, 64
#endif
#ifndef ZS_MW
#define ZS_MW 2  // warps side by side in m
#endif
#ifndef ZS_KW
#define ZS_KW 4  // warps side by side in k
#endif
#ifndef ZS_XSTAGES
#define ZS_XSTAGES 2  // no other number
#endif
#ifndef ZS_WHOLE
#define ZS_WHOLE 0  // 1: a pair's bits depend on nothing but its own row and expert
#endif
#ifndef ZS_HALF
#define ZS_HALF 0  // 1: an item of at most ZS_N / 2 pairs takes half the arithmetic, for some more registers
#endif
#ifndef ZS_BLOCKS
#define ZS_BLOCKS 1  // blocks a multiprocessor
#endif

#include "grouped.cuh"

extern "C" __global__ void __launch_bounds__(ZS_THREADS, ZS_BLOCKS)
zs_zipgemm_grouped(const uint8_t* __restrict__ blobs, uint64_t step, const uint16_t* x, uint32_t by_token, uint16_t* y, uint32_t m, uint32_t k, const uint32_t* words, uint32_t pairs,
                   float* __restrict__ workspace) {
    ZS_SMEM(smem);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, mw = warp / ZS_KW, kw = warp % ZS_KW;
    const uint32_t tiles = smem_addr(smem), xs = tiles + ZS_TILE_SMEM, bars = xs + ZS_X_SMEM, spare = bars + ZS_KW * ZS_XSTAGES * 16 + warp * 128, tile = tiles + warp * 8192;
    griddep_launch();
    if (threadIdx.x < ZS_KW * ZS_XSTAGES) {
        mbarrier_init(bars + 16 * threadIdx.x, 32 * ZS_MW);
        mbarrier_init(bars + 16 * threadIdx.x + 8, ZS_MW);
    }
    for (uint32_t i = threadIdx.x * 16; i < ZS_X_SMEM; i += ZS_THREADS * 16) st_shared_v4(xs + i, Vec4{0, 0, 0, 0});
    __syncthreads();
    griddep_wait();

    const Routing routing(words, pairs);
    const Deal deal(m, k, routing.count());
    if (deal.end <= deal.begin) return;
    const Sections sections(deal);
    // Of the tile after the present one the words and escapes are under way, of the one after that the header.
    Place at(deal);
    Blobs ahead(routing, blobs, step, at.item);  // of the tile two further on, in the loop
    GroupedActivations acts(x, by_token ? routing.owners : routing.pairs, k, xs, bars, mw, kw, lane);
    TileStream stream;
    uint64_t head = 0, next_head = 0;
    const uint8_t *blob = ahead.blob, *next_blob, *next_fixed = 0;
    const GroupedTile first(deal, at, mw, kw);
    bool exists = first.exists;
    if (exists) {
        head = ld_stream_u64(blob + ZS_BLOB_HEADER + 8 * first.number(deal));
        stream.load(blob + sections.fixed + ZS_FIXED * first.number(deal), lane);
    }
    acts.open(routing, at.item, mw, lane);
    acts.fill(0, at.kstep, lane);
    {
        Place second = at;
        if (second.advance(deal)) ahead.open(routing, blobs, step, second.item);
        next_blob = ahead.blob;
        const GroupedTile tile2(deal, second, mw, kw);
        if (tile2.exists) {
            next_fixed = next_blob + sections.fixed + ZS_FIXED * tile2.number(deal);
            next_head = ld_stream_u64(next_blob + ZS_BLOB_HEADER + 8 * tile2.number(deal));
        }
    }
    Escapes now;
    now.load(blob + sections.escapes + 4 * lane, head, lane);

    while (at.left > 0) {
        const uint32_t item = at.item, n = ZS_HALF ? min(routing.tokens(item), (uint32_t)ZS_N) : 0, strip = (uint32_t)out_strip(at.group, mw);
        const int32_t group = (int32_t)item * deal.groups + at.group, last = deal.begin + at.left - 1;
        float acc[ZS_QUADS][4];
#pragma unroll
        for (uint32_t q = 0; q < ZS_QUADS; q++) acc[q][0] = acc[q][1] = acc[q][2] = acc[q][3] = 0.0f;
        const int32_t units = min(at.kstep + 1, at.left);
        for (int32_t u = 0; u < units; u++) {
            const uint64_t head_after = next_head;
            const uint8_t *const fixed = next_fixed, *const blob_after = next_blob;
            next_fixed = 0, next_head = 0;
            Place then = at;
            const bool turns = then.advance(deal);  // the next unit is of another item
            const uint32_t unit = (uint32_t)(deal.end - deal.begin - at.left);
            if (at.left > 1) {
                if (turns) acts.open(routing, then.item, mw, lane);
                acts.fill(unit + 1, then.kstep, lane);
            }
            if (then.advance(deal)) ahead.open(routing, blobs, step, then.item);
            const GroupedTile later(deal, then, mw, kw);
            if (later.exists) {
                next_blob = ahead.blob, next_fixed = next_blob + sections.fixed + ZS_FIXED * later.number(deal);
                next_head = ld_stream_u64(next_blob + ZS_BLOB_HEADER + 8 * later.number(deal));
            }
            if (exists) {
                stream.decode(tile, now.head().base, fixed, lane);
                __syncwarp();
                now.patch(blob + sections.escapes, tile, spare, lane);
                __syncwarp();
                multiply_some(acc, tile, acts.wait(unit), n, lane);
            } else {
                if (fixed) stream.load(fixed, lane);
                acts.wait(unit);
            }
            blob = blob_after, exists = fixed != 0;
            now.load(blob + sections.escapes + 4 * lane, head_after, lane);
            __syncwarp();
            if (lane == 0) mbarrier_arrive(acts.through(unit));
            at.advance(deal);
        }
        const GroupedOutput out = {routing.pairs + routing.first(item), y, ZS_GATED ? m / 2 : m, ZS_HALF ? n : min(routing.tokens(item), (uint32_t)ZS_N)};
        finish(acc, out, deal, group, strip, last, tiles, mw, kw, lane, workspace);
    }
}
