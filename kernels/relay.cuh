// SPDX-License-Identifier: Apache-2.0
// zipgemm_relay's division of work. An *output tile* is ZS_CLUSTER * ZS_GROUPS strips by ZS_N tokens; tiles are numbered in panels of token tiles, in a panel row
// groups major, so that those under way at the same time share weights and activations in L2. As many as go round evenly are made by one cluster each, in turns. The rest
// come last, each by as many clusters as there are for it, in equal parts of k, which begin at the same time. All go through k from its end to its beginning.
#pragma once
#include "tiles.cuh"

#define ZS_CONTROL 32      // words before the flags: number of the last ticket, number of blocks that have ended, less one each; alone in a line of 128 bytes
#define ZS_MOST_SHARERS 4  // clusters that share a tile: more would take longer to add up than they save

struct Plan {
    int32_t strips, ksteps;
    uint32_t token_tiles, row_groups, tiles, whole, parts, sharers, clusters, cluster, rank;
    ZS_DEVICE Plan(const Blob& blob, uint32_t n) {
        strips = (int32_t)blob.row_tiles, ksteps = (int32_t)blob.col_tiles;
        token_tiles = (n + ZS_N - 1) / ZS_N;
        row_groups = (blob.row_tiles + ZS_GROUPS * ZS_CLUSTER - 1) / (ZS_GROUPS * ZS_CLUSTER);
        tiles = row_groups * token_tiles;
        clusters = gridDim.x / ZS_CLUSTER, cluster = blockIdx.x / ZS_CLUSTER;
        rank = ZS_CLUSTER > 1 ? cluster_rank() : 0;
        whole = tiles / clusters * clusters;
        const uint32_t rest = tiles - whole;
        parts = rest ? min(clusters / rest, min((uint32_t)ZS_MOST_SHARERS, blob.col_tiles)) : 1;
        sharers = parts * rest;
    }
    // Whether this cluster ends up with the sums of a tile that it has a part of.
    ZS_DEVICE bool ends(uint32_t tile) const { return tile < whole || cluster % parts == parts - 1; }
    // First strip of this block and first token of an output tile.
    ZS_DEVICE void locate(uint32_t tile, int32_t& strip, uint32_t& token) const {
        const uint32_t panel = tile / (ZS_PANEL * row_groups), in = tile - panel * ZS_PANEL * row_groups;
        const uint32_t width = min((uint32_t)ZS_PANEL, token_tiles - panel * ZS_PANEL);
        strip = (int32_t)((in / width * ZS_CLUSTER + rank) * ZS_GROUPS), token = (panel * ZS_PANEL + in % width) * ZS_N;
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
            const uint32_t part = plan.cluster % plan.parts;
            tile = plan.whole + plan.cluster / plan.parts, shares = false;
            begin = part_begin((uint32_t)plan.ksteps, part, plan.parts), end = part_begin((uint32_t)plan.ksteps, part + 1, plan.parts);
        } else {
            return false;
        }
        plan.locate(tile, strip, token);
        return true;
    }
};

struct Spot {
    int32_t strip, column;  // -1: none
    ZS_DEVICE uint64_t tile(const Plan& plan) const { return (uint64_t)strip * (uint32_t)plan.ksteps + (uint32_t)column; }
};

// Division of numbers below 2^31 by the same divisor again and again.
struct Divider {
    uint32_t by, inverse;
    ZS_DEVICE Divider() {}
    ZS_DEVICE explicit Divider(uint32_t d) : by(d), inverse(0xFFFFFFFFu / d) {}
    ZS_DEVICE uint32_t divide(uint32_t n, uint32_t& rest) const {
        uint32_t q = (uint32_t)((uint64_t)n * inverse >> 32);  // or one too few
        rest = n - q * by;
        if (rest >= by) q++, rest -= by;
        return q;
    }
};

// In what order tiles are decoded: in bands of the row groups that the clusters begin with at the same time; in a band by columns from where the clusters begin
// on, in a column by strips.
struct Order {
    uint32_t strips, bands, tickets;
    int32_t ksteps;
    Divider band, last, parts, whole;  // strips of a band, of the last one; parts of k; tickets of a band
    ZS_DEVICE explicit Order(const Plan& plan) {
        const uint32_t width = min((uint32_t)ZS_PANEL, plan.token_tiles), shared = plan.whole == 0 ? plan.parts : 1;
        const uint32_t height = max(1u, (plan.clusters / shared + width - 1) / width) * ZS_CLUSTER * ZS_GROUPS;
        strips = (uint32_t)plan.strips, ksteps = plan.ksteps;
        bands = (strips + height - 1) / height;
        const uint32_t columns = ((uint32_t)ksteps + shared - 1) / shared * shared;
        band = Divider(height), last = Divider(strips - (bands - 1) * height), parts = Divider(shared), whole = Divider(height * columns);
        tickets = strips * columns;
    }
    // column: -1 where the ticket is of none.
    ZS_DEVICE Spot locate(uint32_t ticket) const {
        uint32_t in, row, part, rest;
        const uint32_t which = whole.divide(ticket, in), at = which + 1 < bands ? band.divide(in, row) : last.divide(ticket - (bands - 1) * whole.by, row);
        const uint32_t step = parts.divide(at, part);
        const int32_t end = (int32_t)parts.divide((uint32_t)ksteps * (part + 1), rest), begin = (int32_t)parts.divide((uint32_t)ksteps * part, rest), column = end - 1 - (int32_t)step;
        return {(int32_t)(min(which, bands - 1) * band.by + row), column < begin ? -1 : column};
    }
};

// Adds up one strip of an output tile over the clusters that shared it, two by two, as `settle` in tiles.cuh. False: another one has the sums.
ZS_DEVICE bool add_up(float (&acc)[ZS_N / 2], const Plan& plan, const Turns& turn, uint32_t g, uint32_t tid, float* workspace) {
    if (turn.tile < plan.whole) return true;
    float* const slot = workspace + (g * (ZS_N / 8) * 128 + tid) * 4;
    const uint32_t parts = plan.parts, below = parts - 1 - plan.cluster % parts;  // how far from the last one
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
