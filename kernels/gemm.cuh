// SPDX-License-Identifier: Apache-2.0
// What the ZipGEMM kernels share: how the units of work are dealt to blocks, the output, the partial sums.
//
// A *strip* is 64 rows of the weight, a row of tiles. A *unit* is ZS_MW strips x ZS_KW column tiles. All units, strip groups major, are dealt to the
// blocks in equal runs (stream-K), but for a lead (ZS_LEAD, ZS_ANYWHERE_LEAD); which block sums what depends on m, k, the grid and these only, and partial sums are
// added in a fixed order in FP32: a token's result is the same bits whatever else is in the batch.
//
// A block takes its run from the end to the beginning, group by group. The first strip group it touches may end in a later block: it publishes that partial sum early.
// The last one may begin in earlier blocks: it adds their sums, which were published long ago, or, where
// the blocks of a group end together, before: that is what the lead is for. A block waits only for lower block indices, so waiting ends
// whatever order the blocks are scheduled in.
#pragma once
#include "bits.cuh"
#include "format.cuh"

// The first of `units` that part `i` of `parts` equal ones has. A division of 64 bits would be a good part of what a small product waits for at its start.
ZS_DEVICE int32_t part_begin(uint32_t units, uint32_t i, uint32_t parts) {
    if (units >> 20 == 0 && parts < 4096) return (int32_t)(units * i / parts);
    return (int32_t)((uint64_t)units * i / parts);
}

#ifndef ZS_LEAD
#define ZS_LEAD 0  // units that a block which adds the sums of others has more than these, where the grid is so many blocks for each strip group and runs are long
#endif
#ifndef ZS_ANYWHERE_LEAD
#define ZS_ANYWHERE_LEAD 0  // where runs begin anywhere and are long: units that the next block has of a run that begins and ends within a group
#endif

// Units of one launch. (Without a lead by another formula: that of a lead takes registers that zipgemm_mma does not have.)
struct Work {
    int32_t strips, col_tiles, ksteps, begin, end;
#if ZS_LEAD
    uint32_t span, sharers, run, shorter;  // of `span` units that `sharers` blocks have, the first `shorter` have `run`, the others one more, the last one the lead besides, but for:
    bool anywhere;                         // ZS_ANYWHERE_LEAD
#else
    uint32_t units;
#endif
    ZS_DEVICE explicit Work(const Blob& blob) {
        strips = (int32_t)blob.row_tiles;
        col_tiles = (int32_t)blob.col_tiles;
        ksteps = (col_tiles + ZS_KW - 1) / ZS_KW;
        const uint32_t groups = (uint32_t)((strips + ZS_MW - 1) / ZS_MW);
#if ZS_LEAD
        const uint32_t each = gridDim.x / groups;
        const bool whole = each > 1 && each * groups == gridDim.x;
        sharers = whole ? each : gridDim.x, span = whole ? (uint32_t)ksteps : groups * (uint32_t)ksteps;
        const uint32_t even = span - (whole && span >= 4 * ZS_LEAD * sharers ? ZS_LEAD : 0);
        run = even / sharers, shorter = sharers - (even - run * sharers);
        anywhere = ZS_ANYWHERE_LEAD && !whole && run >= 4 * ZS_LEAD;
#else
        units = groups * (uint32_t)ksteps;
#endif
        begin = start_of(blockIdx.x), end = start_of(blockIdx.x + 1);
    }
    // First unit of a block.
    ZS_DEVICE int32_t start_of(uint32_t block) const {
#if ZS_LEAD
        const uint32_t set = block / sharers, at = block - set * sharers;
        const uint32_t unit = set * span + at * run + (at > shorter ? at - shorter : 0);
        if (!anywhere) return (int32_t)unit;
        // If the run before this one has begun in the same group, its sums come at its very end, and whoever closes the group waits for them: it ends earlier.
        return (int32_t)(unit % (uint32_t)ksteps >= run + (at > shorter) ? unit - ZS_ANYWHERE_LEAD : unit);
#else
        return part_begin(units, block, gridDim.x);
#endif
    }
};

// SiLU of two BF16 values, rounded to BF16. The exponential and the quotient are the hardware's: 2^-21 off between -8 and 8, and below -87 the result is 0.
ZS_DEVICE uint32_t silu(uint32_t two) {
    const float a = as_float(two << 16), b = as_float(two & 0xFFFF0000u);
    constexpr float LOG2_E = 1.44269504f;
    return pack_bf16(a * reciprocal_approx(1.0f + exp2_approx(-LOG2_E * a)), b * reciprocal_approx(1.0f + exp2_approx(-LOG2_E * b)));
}

// silu(gate) * up of two BF16 values each; of what separate kernels would round here the last rounding is left.
ZS_DEVICE void apply_gates(float& a, float& b, uint32_t gates, uint32_t ups) {
    const uint32_t s = silu(gates);
    a = as_float(s << 16) * as_float(ups << 16), b = as_float(s & 0xFFFF0000u) * as_float(ups & 0xFFFF0000u);
}

struct Output {
    const uint16_t* bias;
    uint16_t* y;
    uint64_t ldy;
    uint32_t m, n;

    // Whether y is such that the copy engine can write it.
    ZS_DEVICE bool by_copies() const { return ldy % 8 == 0 && (uint64_t)y % 16 == 0; }

    // A warp's 16 rows by 8 * PIECES tokens, whose sums lie as wgmma leaves them, with whole 32-byte sectors where all rows are there and y is aligned for it. The warp does
    // it together, some pieces at a time: one after the other each would wait for its own transposition, 200 clocks a piece.
    template <uint32_t PIECES>
    ZS_DEVICE void store_rows(const float (&acc)[4 * PIECES], uint32_t row0, uint32_t lane) const {
        if (row0 + 16 > m || ldy % 4 != 0 || (uint64_t)y % 8 != 0) {
#pragma unroll
            for (uint32_t q = 0; q < PIECES; q++) store({acc[4 * q], acc[4 * q + 1], acc[4 * q + 2], acc[4 * q + 3]}, row0, 8 * q, lane);
            return;
        }
        constexpr uint32_t ROUND = PIECES < 8 ? PIECES : 8;
        static_assert(PIECES % ROUND == 0, "see the loops");
        const float b0 = bias ? as_float((uint32_t)bias[row0 + lane / 4] << 16) : 0.0f, b1 = bias ? as_float((uint32_t)bias[row0 + 8 + lane / 4] << 16) : 0.0f;
        const bool odd = lane & 1;
        uint16_t* const to = y + lane / 4 * ldy + row0 + 2 * (lane & 2) + (odd ? 8 : 0);
#pragma unroll
        for (uint32_t q0 = 0; q0 < PIECES; q0 += ROUND) {
            // Transposed, a lane has rows 2 c, 2 c + 1 (c = lane mod 4) of token lane / 4, and the same of the lower eight rows; a pair of lanes swaps halves.
            uint32_t upper[ROUND], lower[ROUND], other[ROUND];
#pragma unroll
            for (uint32_t i = 0; i < ROUND; i++) {
                const float* const v = acc + 4 * (q0 + i);
                upper[i] = transpose_8x8(pack_bf16(v[0] + b0, v[1] + b0)), lower[i] = transpose_8x8(pack_bf16(v[2] + b1, v[3] + b1));
            }
#pragma unroll
            for (uint32_t i = 0; i < ROUND; i++) other[i] = __shfl_xor_sync(0xFFFFFFFFu, odd ? upper[i] : lower[i], 1);
#pragma unroll
            for (uint32_t i = 0; i < ROUND; i++)
                if (8 * (q0 + i) + lane / 4 < n) st_global_v2(to + 8 * (q0 + i) * ldy, odd ? other[i] : upper[i], odd ? lower[i] : other[i]);
        }
    }

    // One 16x8 piece's four values of a lane: rows row, row + 8; tokens token, token + 1.
    ZS_DEVICE void store(const float (&v)[4], uint32_t row0, uint32_t token0, uint32_t lane) const {
        const uint32_t row = row0 + lane / 4, token = token0 + 2 * (lane % 4);
#pragma unroll
        for (uint32_t h = 0; h < 2; h++) {
            const uint32_t r = row + 8 * h;
            if (r >= m) continue;
            const float b = bias ? as_float((uint32_t)bias[r] << 16) : 0.0f;
            const uint32_t two = pack_bf16(v[2 * h] + b, v[2 * h + 1] + b);
            if (token < n) y[token * ldy + r] = (uint16_t)two;
            if (token + 1 < n) y[(token + 1) * ldy + r] = (uint16_t)(two >> 16);
        }
    }
};


// A partial sum in the workspace is its own flag: a word that has not been written, or has been read, is ZS_EMPTY (which is a NaN that no addition
// gives). So a sum travels in one write and one read, without fences.
#define ZS_EMPTY 0xFFFFFFFFu

ZS_DEVICE uint32_t sum_bits(float v) {
    const uint32_t bits = as_bits(v);
    return bits == ZS_EMPTY ? 0x7FFFFFFFu : bits;
}
ZS_DEVICE void put_sum(float* at, const float (&v)[4]) { st_relaxed_v4(at, Vec4{sum_bits(v[0]), sum_bits(v[1]), sum_bits(v[2]), sum_bits(v[3])}); }
ZS_DEVICE bool is_empty(const Vec4& p) { return p.x == ZS_EMPTY || p.y == ZS_EMPTY || p.z == ZS_EMPTY || p.w == ZS_EMPTY; }
