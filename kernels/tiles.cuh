// SPDX-License-Identifier: Apache-2.0
// What the wgmma kernels share: rings, the division of few tokens' work, how partial sums become results.
//
// A kernel says before it includes this: ZS_N (tokens of a block's output tile), ZS_MW and ZS_KW (gemm.cuh), ZS_CLUSTER (blocks of a cluster),
// ZS_PIECES_AT_ONCE.
#pragma once
#include "gemm.cuh"

#define ZS_PLACES (ZS_MW * ZS_KW)

// A ring's stage and the parity of its present round.
struct Stage {
    uint32_t index, parity;
    ZS_DEVICE explicit Stage(uint32_t first) : index(first), parity(0) {}
    ZS_DEVICE void advance(uint32_t step, uint32_t stages) {
        index += step;
        if (index >= stages) index -= stages, parity ^= 1;
    }
};

// A block's run of units, where all are dealt in equal runs (gemm.cuh).
struct Share {
    int32_t strips, col_tiles, ksteps, begin, end;
    uint32_t row_groups;
    ZS_DEVICE explicit Share(const Blob& blob) {
        strips = (int32_t)blob.row_tiles, col_tiles = (int32_t)blob.col_tiles;
        ksteps = (col_tiles + ZS_KW - 1) / ZS_KW;
        row_groups = (blob.row_tiles + ZS_MW - 1) / ZS_MW;
        begin = start_of(blockIdx.x), end = start_of(blockIdx.x + 1);
    }
    // First unit of a block.
    ZS_DEVICE int32_t start_of(uint32_t block) const { return part_begin(row_groups * ksteps, block, gridDim.x); }
    ZS_DEVICE int32_t units() const { return end - begin; }
};

// A walk through the weight tiles of a share, from its end to its beginning, in pieces of one group of strips each.
struct Walk {
    int32_t left, piece, kstep, strip0;  // units left, in this piece; column step; first strip
    uint32_t tile, place;                // group of strips; of the weight tile in its unit
    ZS_DEVICE Walk(const Share& share, uint32_t first) {
        left = share.units();
        tile = (uint32_t)(share.end - 1) / share.ksteps;
        kstep = share.end - 1 - (int32_t)tile * share.ksteps;
        piece = min(kstep + 1, left);
        strip0 = (int32_t)(tile * ZS_MW);
        place = 0;
        advance(share, first);
    }
    ZS_DEVICE void advance(const Share& share, uint32_t tiles) {
        const uint32_t at = place + tiles;
        const int32_t step = (int32_t)(at / ZS_PLACES);
        place = at % ZS_PLACES;
        left -= step, piece -= step, kstep -= step;
        while (piece <= 0 && left > 0) {  // on to the next piece
            const int32_t over = -piece;
            tile--;
            piece = min(share.ksteps, left + over);
            kstep = share.ksteps - 1 - over, piece -= over;
            strip0 = (int32_t)(tile * ZS_MW);
        }
    }
    ZS_DEVICE int32_t strip() const { return strip0 + (int32_t)(place % ZS_MW); }
    ZS_DEVICE int32_t ktile() const { return kstep * ZS_KW + (int32_t)(place / ZS_MW); }
    ZS_DEVICE uint32_t weight_tile(const Share& share) const { return (uint32_t)(strip() * share.col_tiles + ktile()); }
    ZS_DEVICE bool exists(const Share& share) const { return left > 0 && strip() < share.strips && ktile() < share.col_tiles; }
};

// Adds the sums of `helpers` lower clusters, first, first - 1, .. before this one, to a strip's; as many of their pieces at once as there are registers for.
ZS_DEVICE void add_sums(float (&acc)[ZS_N / 2], float* slot, uint32_t first, uint32_t helpers) {
    constexpr uint32_t FLOATS = ZS_N / 2, AT_ONCE = ZS_PIECES_AT_ONCE, PIECES = FLOATS / 4, ROUND = PIECES < AT_ONCE ? PIECES : AT_ONCE, HELPERS = AT_ONCE / ROUND;
    constexpr uint64_t BLOCK = (uint64_t)ZS_MW * FLOATS * 128;
    for (uint32_t h0 = 0; h0 < helpers; h0 += HELPERS) {
#pragma unroll
        for (uint32_t q0 = 0; q0 < PIECES; q0 += ROUND) {
            Vec4 p[HELPERS][ROUND];
            float* const theirs = slot + (blockIdx.x - (first + h0) * ZS_CLUSTER) * BLOCK + q0 * 512;
#pragma unroll
            for (uint32_t h = 0; h < HELPERS; h++)
#pragma unroll
                for (uint32_t i = 0; i < ROUND; i++)
                    if (h0 + h < helpers) p[h][i] = ld_relaxed_v4(theirs - h * ZS_CLUSTER * BLOCK + i * 512);
#pragma unroll
            for (uint32_t h = 0; h < HELPERS; h++)
                if (h0 + h < helpers)
#pragma unroll
                    for (uint32_t i = 0; i < ROUND; i++) {
                        float* const from = theirs - h * ZS_CLUSTER * BLOCK + i * 512;
                        while (is_empty(p[h][i])) p[h][i] = ld_relaxed_v4(from);
                        float* const v = acc + 4 * (q0 + i);
                        v[0] += as_float(p[h][i].x), v[1] += as_float(p[h][i].y), v[2] += as_float(p[h][i].z), v[3] += as_float(p[h][i].w);
                        st_relaxed_v4(from, Vec4{ZS_EMPTY, ZS_EMPTY, ZS_EMPTY, ZS_EMPTY});
                    }
        }
    }
}

ZS_DEVICE void publish_sums(const float (&acc)[ZS_N / 2], float* slot) {
    constexpr uint32_t PIECES = ZS_N / 8;
#pragma unroll
    for (uint32_t q = 0; q < PIECES; q++)
        put_sum(slot + blockIdx.x * ((uint64_t)ZS_MW * (ZS_N / 2) * 128) + q * 512, {acc[4 * q], acc[4 * q + 1], acc[4 * q + 2], acc[4 * q + 3]});
}

// Adds up one strip of a group over the blocks that shared the group; writes y or publishes. A warpgroup holds the strip's sums as wgmma leaves them: floats
// 4 q .. 4 q + 3 of a thread are a 16x8 piece of its warp's 16 rows and of tokens 8 q .. 8 q + 7. `first`: the column step that the piece began at.
ZS_DEVICE void settle(float (&acc)[ZS_N / 2], const Output& out, const Share& share, const Walk& at, int32_t first, uint32_t mw, uint32_t tid, float* workspace) {
    float* const slot = workspace + ((mw * (ZS_N / 8)) * 128 + tid) * 4;
    if (first != share.ksteps - 1) {
        publish_sums(acc, slot);
        return;
    }
    uint32_t others = 0;
    while (share.start_of(blockIdx.x - others) > (int32_t)at.tile * share.ksteps) others++;
    add_sums(acc, slot, 1, others);
#pragma unroll
    for (uint32_t q = 0; q < ZS_N / 8; q++)
        out.store_together({acc[4 * q], acc[4 * q + 1], acc[4 * q + 2], acc[4 * q + 3]}, ((uint32_t)at.strip0 + mw) * ZS_TILE + tid / 32 * 16, q * 8, tid % 32);
}

// Writes a strip's results by the copy engine: through 128 * ZS_N bytes of shared memory at `at`, 1024-byte aligned, to 64 rows from row0 and ZS_N tokens from token0 on. A copy
// to global memory of thread 0's (bulk_copies_read); `barrier` is a named one of the warpgroup.
ZS_DEVICE void send_strip(const float (&acc)[ZS_N / 2], const Output& out, const TensorMap& y_map, uint32_t row0, uint32_t token0, uint32_t barrier, uint32_t tid, uint32_t at) {
    const uint32_t lane = tid % 32, warp = tid / 32, row = row0 + warp * 16 + lane / 4;
    const float b0 = out.bias && row < out.m ? as_float((uint32_t)out.bias[row] << 16) : 0.0f, b1 = out.bias && row + 8 < out.m ? as_float((uint32_t)out.bias[row + 8] << 16) : 0.0f;
    // Of 16 tokens at a time four matrices: rows 0 to 7 and 8 to 15 of the first eight, of the others. Lanes 8 i .. 8 i + 7 have the addresses of matrix i.
    const uint32_t token = lane / 16 * 8 + lane % 8, to = at + swizzle_chunk(token, warp * 2 + lane / 8 % 2);
#pragma unroll
    for (uint32_t q = 0; q < ZS_N / 8; q += 2) {
        const float* const v = acc + 4 * q;
        store_matrices_transposed(to + q * 1024, {pack_bf16(v[0] + b0, v[1] + b0), pack_bf16(v[2] + b1, v[3] + b1), pack_bf16(v[4] + b0, v[5] + b0), pack_bf16(v[6] + b1, v[7] + b1)});
    }
    fence_proxy_async();
    named_barrier_sync(barrier, 128);
    if (tid == 0) tensor_store(y_map, TensorRows{out.y, out.ldy, out.n, out.m, ZS_N}, row0, token0, at);
}
