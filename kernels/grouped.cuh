// SPDX-License-Identifier: Apache-2.0
// How the grouped product is dealt to blocks, and its walks through weights and activations.
//
// Units are counted through all items (routing.cuh), in an item strip groups major, as gemm.cuh deals those of one weight. How many there are the blocks learn from
// the device, so where a run begins and ends depends on how many experts were hit. Where a pair's bits must not, ZS_WHOLE = 1: then runs
// are of whole strip groups, and every sum over k is made by one block. Runs are of whole groups too where that makes none longer by more than 2 %.
#pragma once
#include "mma.cuh"
#include "routing.cuh"

struct Deal {
    int32_t strips, col_tiles, ksteps, groups, begin, end;  // groups: of one item
    uint32_t total, scale, blocks;                          // start_of: runs of `total` pieces of `scale` units, dealt to `blocks` blocks
    ZS_DEVICE Deal(uint32_t m, uint32_t k, uint32_t items) {
        strips = (int32_t)((m + ZS_TILE - 1) / ZS_TILE), col_tiles = (int32_t)((k + ZS_TILE - 1) / ZS_TILE);
        ksteps = (col_tiles + ZS_KW - 1) / ZS_KW, groups = ZS_GATED ? (strips / 2 + ZS_MW / 2 - 1) / (ZS_MW / 2) : (strips + ZS_MW - 1) / ZS_MW;
        const uint32_t all = items * (uint32_t)groups, units = all * (uint32_t)ksteps;
        const uint32_t longest = (all + gridDim.x - 1) / gridDim.x;  // whole groups of a block
        const bool whole = ZS_WHOLE || (uint64_t)100 * longest * ksteps <= (uint64_t)102 * ((units + gridDim.x - 1) / gridDim.x);
        total = whole ? all : units, scale = whole ? (uint32_t)ksteps : 1;
        blocks = min(gridDim.x, total);  // a block between two others that has nothing would be waited for
        begin = end = 0;
        if (blockIdx.x < blocks) begin = start_of(blockIdx.x), end = start_of(blockIdx.x + 1);
    }
    ZS_DEVICE int32_t start_of(uint32_t block) const { return part_begin(total, block, blocks) * (int32_t)scale; }
};

// Sections of every expert's blob, from its start: all are of one shape.
struct Sections {
    uint64_t fixed, escapes;
    ZS_DEVICE explicit Sections(const Deal& deal) {
        const uint64_t tiles = (uint64_t)deal.strips * (uint64_t)deal.col_tiles;
        fixed = ZS_BLOB_HEADER + ((tiles * 8 + 127) & ~(uint64_t)127);
        escapes = fixed + tiles * ZS_FIXED;
    }
};

// A walk through a block's units from the end to the beginning.
struct Place {
    int32_t left, kstep, group;  // units left; column step; strip group of the item
    uint32_t item;
    ZS_DEVICE explicit Place(const Deal& deal) {
        left = deal.end - deal.begin;
        const int32_t all = (deal.end - 1) / deal.ksteps;
        kstep = (deal.end - 1) - all * deal.ksteps;
        item = (uint32_t)(all / deal.groups);
        group = all - (int32_t)item * deal.groups;
    }
    // True: to another item, if there is any.
    ZS_DEVICE bool advance(const Deal& deal) {
        left--;
        if (kstep-- > 0) return false;
        kstep = deal.ksteps - 1;
        if (group-- > 0) return false;
        group = deal.groups - 1;
        item--;
        return left > 0;
    }
};

// The strip of y that a warp has a part in.
ZS_DEVICE int32_t out_strip(int32_t group, uint32_t mw) {
    return ZS_GATED ? group * (ZS_MW / 2) + (int32_t)(mw / 2) : group * ZS_MW + (int32_t)mw;
}

// A consumer's tile of a place.
struct GroupedTile {
    int32_t strip, ktile;
    bool exists;
    ZS_DEVICE GroupedTile(const Deal& deal, const Place& at, uint32_t mw, uint32_t kw) {
        const int32_t strips = ZS_GATED ? deal.strips / 2 : deal.strips;
        strip = out_strip(at.group, mw), ktile = at.kstep * ZS_KW + (int32_t)kw;
        exists = at.left > 0 && ktile < deal.col_tiles && strip < strips;
        if (ZS_GATED && (mw & 1)) strip += strips;  // the lower half of the weight
    }
    ZS_DEVICE uint64_t number(const Deal& deal) const { return (uint32_t)(strip * deal.col_tiles + ktile); }
};

// Blobs of the experts along a walk: the next one's number is under way since this one began.
struct Blobs {
    const uint8_t* blob;
    uint32_t next;
    ZS_DEVICE Blobs(const Routing& routing, const uint8_t* blobs, uint64_t step, uint32_t item) {
        next = routing.expert(item);
        open(routing, blobs, step, item);
    }
    ZS_DEVICE void open(const Routing& routing, const uint8_t* blobs, uint64_t step, uint32_t item) {
        blob = blobs + next * step;
        if (item > 0) next = routing.expert(item - 1);
    }
};

// The activations of the warps (.., kw): the rows of x of an item's pairs, by a list of their numbers, tile by tile. The ZS_MW warps copy together, one tile ahead
// in two stages, and all read. Rows beyond an item's pairs keep what was there: each column of a product depends on its own row alone.
//
// Which stage, and in which round, follows from the unit's number in the block's run, and where the next unit is from where the present one is: there are no registers for more.
struct GroupedActivations {
    static_assert(ZS_XSTAGES == 2, "a stage is read while the other is filled");
    static constexpr uint32_t ROWS = (ZS_N + ZS_XROWS - 1) / ZS_XROWS;
    const uint16_t* x;             // at this thread's eight columns of 64
    const uint32_t *list, *rows;   // numbers of all rows; of the item that is copied, from this thread's first on. They are read again for each tile, from L1
    int32_t n;                     // this thread's first row beyond the item's pairs is its row n / ZS_XROWS
    uint32_t k, kw, data, bars, fill_to;

    ZS_DEVICE GroupedActivations(const uint16_t* x_, const uint32_t* list_, uint32_t k_, uint32_t xs, uint32_t barriers, uint32_t mw, uint32_t kw_, uint32_t lane) : k(k_), kw(kw_) {
        const uint32_t row0 = (mw * 32 + lane) / 8;
        x = x_ + lane % 8 * 8, list = list_ + row0;
        data = xs + kw * (ZS_XSTAGES * ZS_XBYTES), bars = barriers + kw * (16 * ZS_XSTAGES);
        fill_to = data + row0 * ZS_XROW + lane % 8 * 16;
    }
    ZS_DEVICE void open(const Routing& routing, uint32_t item, uint32_t mw, uint32_t lane) {
        rows = list + routing.first(item);
        n = (int32_t)min(routing.tokens(item), (uint32_t)ZS_N) - (int32_t)((mw * 32 + lane) / 8);
    }
    // Starts the copy for unit number `unit`, which is at column step kstep.
    ZS_DEVICE void fill(uint32_t unit, int32_t kstep, uint32_t lane) const {
        const uint32_t full = bars + 16 * (unit & 1), dst = fill_to + (unit & 1) * ZS_XBYTES;
        mbarrier_wait(full + 8, (unit >> 1 & 1) ^ 1);  // a fresh barrier's previous phase counts as complete
        const uint32_t column = ((uint32_t)kstep * ZS_KW + kw) * 64;
        if (column + 64 <= k && k % 8 == 0 && (uint64_t)x % 16 == 0) {
#pragma unroll ZS_UNROLL_K
            for (uint32_t i = 0; i < ROWS; i++)
                if ((int32_t)(i * ZS_XROWS) < n) cp_async_16(dst + i * (ZS_XROWS * ZS_XROW), x + (uint64_t)rows[i * ZS_XROWS] * k + column);
            cp_async_mbarrier_arrive(full);
        } else {
#pragma unroll 1
            for (uint32_t i = 0; (int32_t)(i * ZS_XROWS) < n; i++)
                st_shared_v4(dst + i * (ZS_XROWS * ZS_XROW), load_x(x + (uint64_t)rows[i * ZS_XROWS] * k + column, column + lane % 8 * 8, k));
            mbarrier_arrive(full);
        }
    }
    // Waits for the rows of unit number `unit`.
    ZS_DEVICE uint32_t wait(uint32_t unit) const {
        mbarrier_wait(bars + 16 * (unit & 1), unit >> 1 & 1);
        return data + (unit & 1) * ZS_XBYTES;
    }
    // The barrier on which one lane of each warp has to arrive when the warp is through with that unit.
    ZS_DEVICE uint32_t through(uint32_t unit) const { return bars + 16 * (unit & 1) + 8; }
};

// multiply for an item of n pairs. With 64 the tensor cores are what the kernel waits for, so half the columns are left out if no pair has them.
ZS_DEVICE void multiply_some(float (&acc)[ZS_QUADS][4], uint32_t tile, uint32_t x, uint32_t n, uint32_t lane) {
#if ZS_HALF
    if (n <= ZS_N / 2)
        multiply<ZS_NTILES / 2>(acc, tile, x, lane);
    else
#endif
        multiply(acc, tile, x, lane);
}

// Rows y[pair] of an item's pairs.
struct GroupedOutput {
    const uint32_t* pairs;
    uint16_t* y;
    uint32_t m, n;
    // One 16x8 piece's four values of a lane: rows row, row + 8 of the weight; tokens token, token + 1.
    ZS_DEVICE void store(const float (&v)[4], uint32_t row0, uint32_t token0, uint32_t lane) const {
        const uint32_t row = row0 + lane / 4, token = token0 + 2 * (lane % 4);
#pragma unroll
        for (uint32_t t = 0; t < 2; t++) {
            if (token + t >= n) continue;
            uint16_t* const to = y + (uint64_t)pairs[token + t] * m;
            const uint32_t two = pack_bf16(v[t], v[2 + t]);
            if (row < m) to[row] = (uint16_t)two;
            if (row + 8 < m) to[row + 8] = (uint16_t)(two >> 16);
        }
    }
};
