// SPDX-License-Identifier: Apache-2.0
// How a block of zipgemm_wgmma goes through its run of units, and what it does with the sums.
#pragma once
#include "tiles.cuh"

// A walk through the weight tiles of a block's run (gemm.cuh), from its end to its beginning, in pieces of one group of strips each.
struct Walk {
    int32_t left, piece, kstep, strip0;  // units left, in this piece; column step; first strip
    uint32_t tile, place;                // group of strips; of the weight tile in its unit
    ZS_DEVICE Walk(const Work& work, uint32_t first) {
        left = work.end - work.begin;
        tile = (uint32_t)(work.end - 1) / work.ksteps;
        kstep = work.end - 1 - (int32_t)tile * work.ksteps;
        piece = min(kstep + 1, left);
        strip0 = (int32_t)(tile * ZS_MW);
        place = 0;
        advance(work, first);
    }
    ZS_DEVICE void advance(const Work& work, uint32_t tiles) {
        const uint32_t at = place + tiles;
        const int32_t step = (int32_t)(at / ZS_PLACES);
        place = at % ZS_PLACES;
        left -= step, piece -= step, kstep -= step;
        while (piece <= 0 && left > 0) {  // on to the next piece
            const int32_t over = -piece;
            tile--;
            piece = min(work.ksteps, left + over);
            kstep = work.ksteps - 1 - over, piece -= over;
            strip0 = (int32_t)(tile * ZS_MW);
        }
    }
    ZS_DEVICE int32_t strip() const { return strip0 + (int32_t)(place % ZS_MW); }
    ZS_DEVICE int32_t ktile() const { return kstep * ZS_KW + (int32_t)(place / ZS_MW); }
    ZS_DEVICE uint32_t weight_tile(const Work& work) const { return (uint32_t)(strip() * work.col_tiles + ktile()); }
    ZS_DEVICE bool exists(const Work& work) const { return left > 0 && strip() < work.strips && ktile() < work.col_tiles; }
};

// Adds up one strip of a group over the blocks that shared the group; writes y or publishes. A warpgroup holds the strip's sums as wgmma leaves them: floats
// 4 q .. 4 q + 3 of a thread are a 16x8 piece of its warp's 16 rows and of tokens 8 q .. 8 q + 7. `first`: the column step that the piece began at.
ZS_DEVICE void settle(float (&acc)[ZS_N / 2], const Output& out, const Work& work, const Walk& at, int32_t first, uint32_t mw, uint32_t tid, float* workspace) {
    float* const slot = workspace + ((mw * (ZS_N / 8)) * 128 + tid) * 4;
    if (first != work.ksteps - 1) {
        publish_sums(acc, slot);
        return;
    }
    uint32_t others = 0;
    while (work.start_of(blockIdx.x - others) > (int32_t)at.tile * work.ksteps) others++;
    add_sums(acc, slot, 1, others);
    out.store_rows<ZS_N / 8>(acc, ((uint32_t)at.strip0 + mw) * ZS_TILE + tid / 32 * 16, tid % 32);
}
