// SPDX-License-Identifier: Apache-2.0
// In what order the tiles of zipgemm_relay are decoded.
#pragma once
#include "turns.cuh"

#define ZS_CONTROL 32  // words before the flags: number of the last ticket, number of blocks that have ended, less one each; alone in a line of 128 bytes

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
