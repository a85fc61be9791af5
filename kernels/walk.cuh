// SPDX-License-Identifier: Apache-2.0
// How a block of zipgemm_wgmma goes through its run of units, and what it does with the sums.
#pragma once
#include "tiles.cuh"

// A walk through the weight tiles of a block's run (gemm.cuh), from its last group of strips to its first, in pieces of one group each: down through k. In step, up through k,
// and round a whole group from the k where the piece before it ended: as runs are equally long, pieces that begin with a group, and whole groups, are at the same k in all
// blocks, and a run's last piece at one that is the same for all of these. (A run within a group is at as far from its first k.)
struct Walk {
    int32_t left, piece, kstep, strip0;  // units left, in this piece; column step; first strip
    uint32_t tile, place;                // group of strips; of the weight tile in its unit
    ZS_DEVICE Walk(const Work& work, uint32_t first) {
        left = work.end - work.begin;
        tile = (uint32_t)(work.end - 1) / work.ksteps;
        kstep = work.end - 1 - (int32_t)tile * work.ksteps;
        piece = min(kstep + 1, left);
        if (ZS_IN_STEP) kstep -= piece - 1;
        strip0 = (int32_t)(tile * ZS_MW);
        place = 0;
        advance(work, first);
    }
    ZS_DEVICE void advance(const Work& work, uint32_t tiles) {
        const uint32_t at = place + tiles;
        const int32_t step = (int32_t)(at / ZS_PLACES);
        place = at % ZS_PLACES;
        left -= step, piece -= step, kstep += ZS_IN_STEP ? step : -step;
        while (piece <= 0 && left > 0) {  // on to the next piece
            const int32_t over = -piece;
            tile--;
            piece = min(work.ksteps, left + over);
            if (!ZS_IN_STEP) kstep = work.ksteps - 1 - over;
            else if (piece < work.ksteps) kstep = work.ksteps - left;
            piece -= over;
            strip0 = (int32_t)(tile * ZS_MW);
        }
        while (ZS_IN_STEP && kstep >= work.ksteps) kstep -= work.ksteps;
    }
    // Whether the run has the present group to its end.
    ZS_DEVICE bool closes(const Work& work) const { return (int32_t)(tile + 1) * work.ksteps <= work.end; }
    // With gates the strips of a group are one of the gate and the same rows of what it is for.
    ZS_DEVICE int32_t strip(const Work& work) const {
        const int32_t i = (int32_t)(place % ZS_MW);
        return ZS_GATED ? strip0 / 2 + i * (work.strips / 2) : strip0 + i;
    }
    ZS_DEVICE int32_t ktile() const { return kstep * ZS_KW + (int32_t)(place / ZS_MW); }
    ZS_DEVICE uint32_t weight_tile(const Work& work) const { return (uint32_t)(strip(work) * work.col_tiles + ktile()); }
    ZS_DEVICE bool exists(const Work& work) const { return left > 0 && strip(work) < work.strips && ktile() < work.col_tiles; }
};

// Adds up one strip of a group over the blocks that shared the group, or publishes: then another one has the sums. A warpgroup holds the strip's sums as wgmma leaves them:
// floats 4 q .. 4 q + 3 of a thread are a 16x8 piece of its warp's 16 rows and of tokens 8 q .. 8 q + 7.
ZS_DEVICE bool settle(float (&acc)[ZS_N / 2], const Work& work, const Walk& at, uint32_t mw, uint32_t tid, float* workspace) {
    float* const slot = workspace + ((mw * (ZS_N / 8)) * 128 + tid) * 4;
    if (!at.closes(work)) {
        publish_sums(acc, slot);
        return false;
    }
    uint32_t others = 0;
    while (work.start_of(blockIdx.x - others) > (int32_t)at.tile * work.ksteps) others++;
    add_sums(acc, slot, 1, others);
    return true;
}

// The sums of a strip of gates become silu(gate) * up; rows: of the thread's first ones among the gates.
ZS_DEVICE void apply_gates(float (&gates)[ZS_N / 2], const float (&ups)[ZS_N / 2], const uint16_t* bias, uint32_t row, uint32_t half) {
    const auto of = [&](uint32_t r) { return bias ? as_float((uint32_t)bias[r] << 16) : 0.0f; };
    const float g0 = of(row), g1 = of(row + 8), u0 = of(half + row), u1 = of(half + row + 8);
#pragma unroll
    for (uint32_t q = 0; q < ZS_N / 8; q++) {
        float* const g = gates + 4 * q;
        const float* const u = ups + 4 * q;
        apply_gates(g[0], g[1], pack_bf16(g[0] + g0, g[1] + g0), pack_bf16(u[0] + u0, u[1] + u0));
        apply_gates(g[2], g[3], pack_bf16(g[2] + g1, g[3] + g1), pack_bf16(u[2] + u1, u[3] + u1));
    }
}
