// SPDX-License-Identifier: Apache-2.0
// Which output tiles the blocks of the kernels for many tokens make, and how those that share one add up.
//
// An *output tile* is ZS_CLUSTER / ZS_ACROSS * ZS_GROUPS strips by ZS_ACROSS * ZS_N tokens. Tiles are numbered in panels of ZS_PANEL token tiles, in a panel row groups
// major, so that those under way at the same time share weights and activations in L2. As many as go round evenly are made by one cluster each, in turns. The rest come
// last, each by as many clusters as there are for it, in parts of k that are equal but for a lead (ZS_PART_LEAD). All go through k from its end to its beginning, and those
// that do so at the same time share what they read: with runs that begin anywhere in k a long k takes half as long again.
//
// A kernel says before it includes this, beside what tiles.cuh wants: ZS_GROUPS (strips of a block), ZS_ACROSS (blocks of a cluster that have the same strips, and
// different tokens; the others have the same tokens).
#pragma once
#include "tiles.cuh"

#ifndef ZS_PANEL
#define ZS_PANEL 8
#endif
#ifndef ZS_PART_LEAD
#define ZS_PART_LEAD 0  // columns that a cluster which adds the sums of another part of its tile has more than that, for the time that sums take on their way
#endif
#define ZS_MOST_SHARERS 4                    // clusters that share a tile: more would take longer to add up than they save
#define ZS_ABREAST (ZS_CLUSTER / ZS_ACROSS)  // blocks of a cluster that have different strips

static_assert(ZS_GROUPS == ZS_MW, "partial sums lie by ZS_MW strips a block");

struct Plan {
    int32_t strips, ksteps;
    int32_t part_begins, part_ends;  // columns of this cluster's part of a shared tile
    uint32_t token_tiles, row_groups, tiles, whole, parts, part, sharers, clusters, cluster, rank;
    ZS_DEVICE Plan(const Blob& blob, uint32_t n) {
        strips = (int32_t)blob.row_tiles, ksteps = (int32_t)blob.col_tiles;
        token_tiles = (n + ZS_ACROSS * ZS_N - 1) / (ZS_ACROSS * ZS_N);
        row_groups = (blob.row_tiles + ZS_GROUPS * ZS_ABREAST - 1) / (ZS_GROUPS * ZS_ABREAST);
        tiles = row_groups * token_tiles;
        clusters = gridDim.x / ZS_CLUSTER, cluster = blockIdx.x / ZS_CLUSTER;
        rank = ZS_CLUSTER > 1 ? cluster_rank() : 0;
        whole = tiles / clusters * clusters;
        const uint32_t rest = tiles - whole;
        parts = rest ? min(clusters / rest, min((uint32_t)ZS_MOST_SHARERS, blob.col_tiles)) : 1;
        sharers = parts * rest;
        part = cluster - over(cluster) * parts;
#if ZS_PART_LEAD
        const uint32_t adds = parts - 1, lead = adds * (4 * ZS_PART_LEAD) <= (uint32_t)ksteps ? ZS_PART_LEAD : 0, run = over((uint32_t)ksteps - adds * lead);
        const uint32_t first = part == 3 || (parts == 4 && part == 2) ? 1 : 0;  // leads of the parts before this one
        part_begins = (int32_t)(part * run + first * lead);
        part_ends = part == adds ? ksteps : part_begins + (int32_t)(run + (parts == 4 && part == 1 ? lead : 0));
#else
        part_begins = part_begin((uint32_t)ksteps, part, parts), part_ends = part_begin((uint32_t)ksteps, part + 1, parts);
#endif
    }
    // v / parts, which are 1 to 4. (A division takes as long as a load from L2.)
    ZS_DEVICE uint32_t over(uint32_t v) const { return parts == 3 ? v / 3 : v >> parts / 2; }
    // Whether this cluster ends up with the sums of a tile that it has a part of.
    ZS_DEVICE bool ends(uint32_t tile) const { return tile < whole || part == parts - 1; }
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
    int32_t begin, end, strip;
    bool shares;  // a part of a shared tile is still to come
    ZS_DEVICE explicit Turns(const Plan& plan) : coming(plan.cluster), tile(0), token(0), begin(0), end(0), strip(0), shares(plan.cluster < plan.sharers) {}
    ZS_DEVICE bool next(const Plan& plan) {
        if (coming < plan.whole) {
            tile = coming, coming += plan.clusters;
            begin = 0, end = plan.ksteps;
        } else if (shares) {
            tile = plan.whole + plan.over(plan.cluster), shares = false;
            begin = plan.part_begins, end = plan.part_ends;
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
    const uint32_t parts = plan.parts, below = parts - 1 - plan.part;  // how far from the last one
#pragma unroll 1
    for (uint32_t d = 1; d < parts; d *= 2) {
        if (below & d) {
            publish_sums(acc, slot);
            return false;
        }
        const uint32_t others = below + d < parts;
        add_sums(acc, slot, d, others);
    }
    return true;
}
