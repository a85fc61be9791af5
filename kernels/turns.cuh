// SPDX-License-Identifier: Apache-2.0
// Which output tiles the blocks of the kernels for many tokens make, and how those that share one add up.
//
// An *output tile* is ZS_CLUSTER / ZS_ACROSS * ZS_GROUPS strips by ZS_ACROSS * ZS_N tokens. Tiles are numbered in panels of ZS_PANEL token tiles, in a panel row groups
// major, so that those under way at the same time share weights and activations in L2. As many as go round evenly are made by one cluster each, in turns. The rest come
// last; their columns are dealt to clusters in runs that are equal but for a lead (ZS_PART_LEAD): to so many for each tile, or, where that leaves too many clusters idle
// and there are few token tiles, to all of them, so that a run may begin anywhere in k and go on in the tile before. All go through k from its end to its beginning, and
// those that do so at the same time share what they read: with many token tiles and runs that begin anywhere in k a long k takes half as long again.
//
// A kernel says before it includes this, beside what tiles.cuh wants: ZS_GROUPS (strips of a block), ZS_ACROSS (blocks of a cluster that have the same strips, and
// different tokens; the others have the same tokens).
#pragma once
#include "tiles.cuh"

#ifndef ZS_PANEL
#define ZS_PANEL 8
#endif
#ifndef ZS_PART_LEAD
#define ZS_PART_LEAD 0  // columns by which a run ends earlier that the next one, in the same tile, would wait for, as sums take time on their way
#endif
#ifndef ZS_ANYWHERE
#define ZS_ANYWHERE 0  // token tiles with which runs may begin anywhere,
#endif
#ifndef ZS_SHORTER
#define ZS_SHORTER 20  // if they then are so many columns shorter: as much is lost by two pieces in a run and three in a tile
#endif
#define ZS_MOST_SHARERS 4                    // clusters that tiles are cut for evenly: more would take longer to add up than they save
#define ZS_ABREAST (ZS_CLUSTER / ZS_ACROSS)  // blocks of a cluster that have different strips

static_assert(ZS_GROUPS == ZS_MW, "partial sums lie by ZS_MW strips a block");

// A place in the columns of the rest: columns before `column` of the tile are before it.
struct Cut {
    uint32_t tile;  // of the rest
    int32_t column;
};

struct Plan {
    int32_t strips, ksteps;
    uint32_t token_tiles, row_groups, tiles, whole, rest, parts, sharers, clusters, cluster, rank;
    Cut begins, ends;  // this cluster's run of the rest
    bool together;     // so many runs for each tile
    ZS_DEVICE Plan(const Blob& blob, uint32_t n) {
        strips = (int32_t)blob.row_tiles, ksteps = (int32_t)blob.col_tiles;
        token_tiles = (n + ZS_ACROSS * ZS_N - 1) / (ZS_ACROSS * ZS_N);
        row_groups = (blob.row_tiles + ZS_GROUPS * ZS_ABREAST - 1) / (ZS_GROUPS * ZS_ABREAST);
        tiles = row_groups * token_tiles;
        clusters = gridDim.x / ZS_CLUSTER, cluster = blockIdx.x / ZS_CLUSTER;
        rank = ZS_CLUSTER > 1 ? cluster_rank() : 0;
        whole = tiles / clusters * clusters;
        rest = tiles - whole;
        parts = rest ? min(clusters / rest, min((uint32_t)ZS_MOST_SHARERS, blob.col_tiles)) : 1;
        sharers = parts * rest, together = true;
#if ZS_ANYWHERE
        if (rest && token_tiles <= ZS_ANYWHERE && parts < ZS_MOST_SHARERS && (clusters - sharers) * blob.col_tiles > ZS_SHORTER * parts * clusters)
            sharers = clusters, together = false;
#endif
        begins = ends = Cut{0, 0};
        if (cluster < sharers) begins = cut(cluster), ends = cut(cluster + 1);
    }
    // v / parts, which are 1 to 4. (A division takes as long as a load from L2.)
    ZS_DEVICE uint32_t over(uint32_t v) const { return parts == 3 ? v / 3 : v >> parts / 2; }
    // Where the run of cluster i begins.
    ZS_DEVICE Cut cut(uint32_t i) const {
        uint32_t tile, column;
        bool late;  // the run before this one has begun in the same tile
        if (together) {
            tile = over(i);
            const uint32_t part = i - tile * parts;
            column = over(part * (uint32_t)ksteps), late = part > 0;
        } else {
            tile = i * rest / sharers;
            const uint32_t of = i * rest - tile * sharers;
            column = of * (uint32_t)ksteps / sharers, late = of >= rest;
        }
        // Sums of a run that ends there would come last of all, when the next one waits for them.
        if (ZS_PART_LEAD && late && ksteps >= 12 * ZS_PART_LEAD) column -= ZS_PART_LEAD;
        return {tile, (int32_t)column};
    }
    // Whether this cluster ends up with the sums of a tile that it has a part of.
    ZS_DEVICE bool settles(uint32_t tile) const { return tile < whole || tile - whole < ends.tile; }
    // First strip of this block and first token of an output tile.
    ZS_DEVICE void locate(uint32_t tile, int32_t& strip, uint32_t& token) const {
        const uint32_t panel = token_tiles > ZS_PANEL ? tile / (ZS_PANEL * row_groups) : 0, in = tile - panel * ZS_PANEL * row_groups;
        const uint32_t width = min((uint32_t)ZS_PANEL, token_tiles - panel * ZS_PANEL);
        strip = (int32_t)((in / width * ZS_ABREAST + rank / ZS_ACROSS) * ZS_GROUPS), token = ((panel * ZS_PANEL + in % width) * ZS_ACROSS + rank % ZS_ACROSS) * ZS_N;
    }
};

// A cluster's turns: of an output tile the columns begin .. end - 1.
struct Turns {
    uint32_t coming, tile, token;
    int32_t begin, end, strip, shared;  // shared: next tile of the rest, counted down
    ZS_DEVICE explicit Turns(const Plan& plan) : coming(plan.cluster), tile(0), token(0), begin(0), end(0), strip(0) {
        shared = (int32_t)plan.ends.tile - (plan.ends.column == 0);
    }
    ZS_DEVICE bool next(const Plan& plan) {
        if (coming < plan.whole) {
            tile = coming, coming += plan.clusters;
            begin = 0, end = plan.ksteps;
        } else if (shared >= (int32_t)plan.begins.tile) {
            tile = plan.whole + (uint32_t)shared;
            begin = shared == (int32_t)plan.begins.tile ? plan.begins.column : 0, end = shared == (int32_t)plan.ends.tile ? plan.ends.column : plan.ksteps;
            shared--;
        } else {
            return false;
        }
        plan.locate(tile, strip, token);
        return true;
    }
};

// Adds up one strip of an output tile over the clusters that shared it: two by two, then these two by two, .. False: another one has the sums.
ZS_DEVICE bool add_up(float (&acc)[ZS_N / 2], const Plan& plan, const Turns& turn, uint32_t g, uint32_t tid, float* workspace) {
    if (turn.tile < plan.whole) return true;
    float* const slot = workspace + (g * (ZS_N / 8) * 128 + tid) * 4;
    const uint32_t tile = turn.tile - plan.whole;
    auto goes_on = [&](uint32_t i) {  // the run of cluster i begins within the tile
        const Cut c = plan.cut(i);
        return c.tile == tile && c.column > 0;
    };
    uint32_t below = 0, others = 0;  // clusters that have parts of the tile behind this one's, and before it
    while (goes_on(plan.cluster + below + 1)) below++;
    while (goes_on(plan.cluster - others)) others++;
    // Where runs begin anywhere one cluster adds all of them: the farthest first, which has published long ago, as it went on in the tile before; the next one ends last.
#pragma unroll 1
    for (uint32_t d = plan.together ? 1 : max(others, 1u); d != 0 && d <= below + others; d = plan.together ? 2 * d : d - 1) {
        if (plan.together ? below & d : below) {
            publish_sums(acc, slot);
            return false;
        }
        add_sums(acc, slot, d, others >= d);
    }
    return true;
}
