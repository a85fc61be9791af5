// SPDX-License-Identifier: Apache-2.0
// What the wgmma kernels share: which output tiles a block makes and in what order, how partial sums become results.
//
// A kernel says before it includes this: ZS_N (tokens of an output tile), ZS_MW and ZS_KW (gemm.cuh), ZS_CLUSTER (blocks of a cluster; they have neighbouring
// strips of the same tokens), ZS_TOKEN_TILES (1: any number of tokens, 0: at most ZS_N), ZS_PIECES_AT_ONCE.
#pragma once
#include "gemm.cuh"

#define ZS_PLACES (ZS_MW * ZS_KW)
#define ZS_PANEL 8  // token tiles beside each other in the order of output tiles

// A ring's stage and the parity of its present round.
struct Stage {
    uint32_t index, parity;
    ZS_DEVICE explicit Stage(uint32_t first) : index(first), parity(0) {}
    ZS_DEVICE void advance(uint32_t step, uint32_t stages) {
        index += step;
        if (index >= stages) index -= stages, parity ^= 1;
    }
};

// What a cluster (or a block, where there are none) does. An *output tile* is ZS_CLUSTER * ZS_MW strips by ZS_N tokens. The first `streamed` output tiles are
// dealt by units, in equal runs; of the others each is one cluster's, in turns. Few tokens: all are dealt by units.
struct Share {
    int32_t strips, col_tiles, ksteps, begin, end;
    uint32_t token_tiles, row_groups, tiles, streamed, clusters, cluster, rank;
    uint32_t parts;  // where not 1, every output tile is shared by so many clusters, in equal runs (not looked for where tokens are few, and so are sums)
    ZS_DEVICE Share(const Blob& blob, uint32_t n) {
        strips = (int32_t)blob.row_tiles, col_tiles = (int32_t)blob.col_tiles;
        ksteps = (col_tiles + ZS_KW - 1) / ZS_KW;
        row_groups = (blob.row_tiles + ZS_MW * ZS_CLUSTER - 1) / (ZS_MW * ZS_CLUSTER);
        token_tiles = ZS_TOKEN_TILES ? (n + ZS_N - 1) / ZS_N : 1;
        tiles = row_groups * token_tiles;
        clusters = gridDim.x / ZS_CLUSTER, cluster = blockIdx.x / ZS_CLUSTER;
        rank = ZS_CLUSTER > 1 ? cluster_rank() : 0;
        streamed = tiles;
        if (ZS_TOKEN_TILES && tiles >= 2 * clusters) streamed = tiles % clusters == 0 ? 0 : tiles % clusters + clusters;
        parts = ZS_TOKEN_TILES && streamed == tiles && clusters % tiles == 0 ? clusters / tiles : 1;
        begin = start_of(cluster), end = start_of(cluster + 1);
    }
    // First unit of a cluster.
    ZS_DEVICE int32_t start_of(uint32_t c) const { return part_begin(streamed * ksteps, c, clusters); }
    ZS_DEVICE int32_t units() const { return end - begin + (int32_t)((tiles - streamed) / clusters) * ksteps; }
    // First strip of this block and first token of an output tile: panels of ZS_PANEL token tiles, in a panel row groups major, so that tiles under way at
    // the same time share weights and activations in L2.
    ZS_DEVICE void locate(uint32_t tile, int32_t& strip, uint32_t& token) const {
        uint32_t group = tile, column = 0;
        if (ZS_TOKEN_TILES) {
            const uint32_t panel = tile / (ZS_PANEL * row_groups), rest = tile - panel * ZS_PANEL * row_groups;
            const uint32_t width = min((uint32_t)ZS_PANEL, token_tiles - panel * ZS_PANEL);
            group = rest / width, column = panel * ZS_PANEL + rest % width;
        }
        strip = (int32_t)((group * ZS_CLUSTER + rank) * ZS_MW), token = column * ZS_N;
    }
};

// A walk through the weight tiles of a cluster's share: in pieces of an output tile each, from the end of k to the beginning; the streamed run from its end
// to its beginning, then whole tiles.
struct Walk {
    int32_t left, piece, streamed, kstep, strip0;  // units left, in this piece, and of the run after it; column step; first strip
    uint32_t tile, next, token0, place;            // output tile, next whole one; first token; of the weight tile in its unit
    ZS_DEVICE Walk(const Share& share, uint32_t first) {
        left = share.units(), streamed = share.end - share.begin;
        next = share.streamed + share.cluster;
        tile = (uint32_t)(share.end - 1) / share.ksteps + 1;
        piece = 0, kstep = -1, strip0 = 0, token0 = 0;
        if (streamed > 0) {
            tile--;
            kstep = share.end - 1 - (int32_t)tile * share.ksteps;
            piece = min(kstep + 1, streamed);
            streamed -= piece;
            share.locate(tile, strip0, token0);
        }
        place = 0;
        advance(share, first);
    }
    ZS_DEVICE void advance(const Share& share, uint32_t tiles) {
        const uint32_t at = place + tiles;
        const int32_t step = (int32_t)(at / ZS_PLACES);
        place = at % ZS_PLACES;
        left -= step, piece -= step, kstep -= step;
        turn(share);
    }
    // On to the same place of the next unit; stays at the last one.
    ZS_DEVICE void advance(const Share& share) {
        if (left <= 1) return;
        left--, piece--, kstep--;
        turn(share);
    }
    // To the next piece where one has come to an end.
    ZS_DEVICE void turn(const Share& share) {
        while (piece <= 0 && left > 0) {
            const int32_t over = -piece;
            if (streamed > 0) {
                tile--;
                piece = min(share.ksteps, streamed);
                streamed -= piece;
            } else {
                tile = next, next += share.clusters;
                piece = share.ksteps;
            }
            kstep = share.ksteps - 1 - over, piece -= over;
            share.locate(tile, strip0, token0);
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

// Adds up one strip of a strip group over the clusters that shared the group; writes y or publishes. A warpgroup holds the strip's sums as wgmma leaves them:
// floats 4 q .. 4 q + 3 of a thread are a 16x8 piece of its warp's 16 rows and of tokens 8 q .. 8 q + 7. `first`: the column step that the piece began at.
ZS_DEVICE void settle(float (&acc)[ZS_N / 2], const Output& out, const Share& share, const Walk& at, int32_t first, uint32_t mw, uint32_t tid, float* workspace) {
    float* const slot = workspace + ((mw * (ZS_N / 8)) * 128 + tid) * 4;
    // In equal runs all come to their end at the same time: they add up two by two, then these two by two, .. Else the last adds the sums of all others, which
    // were published long ago.
    const bool even = ZS_TOKEN_TILES && share.parts > 1;
    const uint32_t below = share.parts - 1 - share.cluster % share.parts, end = even ? share.parts : 2;  // how far from the last one; of the distances
#pragma unroll 1
    for (uint32_t d = 1; d < end; d *= 2) {
        if (even ? (below & d) != 0 : first != share.ksteps - 1) {
            publish_sums(acc, slot);
            return;
        }
        uint32_t others = 0;  // d below this one, and lower
        if (even)
            others = below + d < share.parts;
        else if (at.tile < share.streamed)
            while (share.start_of(share.cluster - others) > (int32_t)at.tile * share.ksteps) others++;
        add_sums(acc, slot, d, others);
    }
#pragma unroll
    for (uint32_t q = 0; q < ZS_N / 8; q++)
        out.store_together({acc[4 * q], acc[4 * q + 1], acc[4 * q + 2], acc[4 * q + 3]}, ((uint32_t)at.strip0 + mw) * ZS_TILE + tid / 32 * 16, at.token0 + q * 8, tid % 32);
}
