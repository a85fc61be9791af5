// SPDX-License-Identifier: Apache-2.0
// What the ZipGEMM kernels share: how the units of work are dealt to blocks, the warp that brings the activations, the output.
//
// A *strip* is 64 rows of the weight, a row of tiles. A *unit* is ZS_MW strips x ZS_KW column tiles. All units, strip groups major, are dealt to the
// blocks in equal runs (stream-K); which block sums what depends on m, k and the grid only, never on the tokens, and partial sums are
// added in a fixed order in FP32: a token's result is the same bits whatever else is in the batch.
//
// A block takes its run from the end to the beginning. The first strip group it touches may end in a later block: it publishes that partial sum early.
// The last one may begin in earlier blocks: it adds their sums, which were published long ago. A block waits only for lower block indices, so waiting ends
// whatever order the blocks are scheduled in.
#pragma once
#include "format.cuh"


// Units of one launch.
struct Work {
    int32_t strips, col_tiles, ksteps, begin, end;
    uint32_t units;
    ZS_DEVICE explicit Work(const Blob& blob) {
        strips = (int32_t)blob.row_tiles;
        col_tiles = (int32_t)blob.col_tiles;
        ksteps = (col_tiles + ZS_KW - 1) / ZS_KW;
        units = (uint32_t)((strips + ZS_MW - 1) / ZS_MW * ksteps);
        begin = start_of(blockIdx.x);
        end = start_of(blockIdx.x + 1);
    }
    // First unit of a block.
    ZS_DEVICE int32_t start_of(uint32_t block) const { return (int32_t)((uint64_t)units * block / gridDim.x); }
};

// A walk through units from the end to the beginning, with the tile of one consumer.
struct Cursor {
    int32_t left, kstep, strip, ktile;  // units left; column step; row of tiles of this consumer; its column of tiles
    const uint8_t *fixed, *header;      // of its tile
    ZS_DEVICE Cursor(const Work& w, const Blob& b, uint32_t mw, uint32_t kw) {
        left = w.end - w.begin;
        const int32_t group = (w.end - 1) / w.ksteps;
        kstep = (w.end - 1) - group * w.ksteps;
        strip = group * ZS_MW + (int32_t)mw;
        ktile = kstep * ZS_KW + (int32_t)kw;
        locate(w, b);
    }
    ZS_DEVICE void locate(const Work& w, const Blob& b) {
        const uint32_t tile = (uint32_t)(strip * w.col_tiles + ktile);
        fixed = b.fixed + (uint64_t)tile * ZS_FIXED, header = b.headers + (uint64_t)tile * 8;
    }
    ZS_DEVICE void advance(const Work& w, const Blob& b) {
        left--;
        if (kstep > 0) {
            kstep--;
            ktile -= ZS_KW;
            fixed -= ZS_KW * ZS_FIXED, header -= ZS_KW * 8;
        } else {
            kstep = w.ksteps - 1;
            ktile += kstep * ZS_KW;
            strip -= ZS_MW;
            locate(w, b);
        }
    }
    ZS_DEVICE bool exists(const Work& w) const { return left > 0 && ktile < w.col_tiles && strip < w.strips; }
};

ZS_DEVICE float as_float(uint32_t v) {
    union {
        uint32_t u;
        float f;
    } c;
    c.u = v;
    return c.f;
}
ZS_DEVICE uint32_t as_bits(float v) {
    union {
        uint32_t u;
        float f;
    } c;
    c.f = v;
    return c.u;
}

struct Output {
    const uint16_t* bias;
    uint16_t* y;
    uint64_t ldy;
    uint32_t m, n;

    // The same, with whole 32-byte sectors where all rows are there and y is aligned for it. The warp does it together.
    ZS_DEVICE void store_together(const float (&v)[4], uint32_t row0, uint32_t token0, uint32_t lane) const {
        if (row0 + 16 > m || ldy % 4 != 0 || (uint64_t)y % 8 != 0) {
            store(v, row0, token0, lane);
            return;
        }
        const float b0 = bias ? as_float((uint32_t)bias[row0 + lane / 4] << 16) : 0.0f, b1 = bias ? as_float((uint32_t)bias[row0 + 8 + lane / 4] << 16) : 0.0f;
        // Transposed, a lane has rows 2 c, 2 c + 1 (c = lane mod 4) of token lane / 4, and the same of the lower eight rows; a pair of lanes swaps halves.
        const uint32_t upper = transpose_8x8(pack_bf16(v[0] + b0, v[1] + b0)), lower = transpose_8x8(pack_bf16(v[2] + b1, v[3] + b1));
        const bool odd = lane & 1;
        const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, odd ? upper : lower, 1);
        const uint32_t token = token0 + lane / 4, row = row0 + 2 * (lane & 2) + (odd ? 8 : 0);
        if (token < n) st_global_v2(y + token * ldy + row, odd ? other : upper, odd ? lower : other);
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

// Adds up one strip of a strip group over the blocks that shared the group; writes y or publishes. A warpgroup holds the strip's sums as wgmma leaves them:
// floats 4 q .. 4 q + 3 of a thread are a 16x8 piece of its warp's 16 rows and of tokens 8 q .. 8 q + 7.
template <int FLOATS, int AT_ONCE>
ZS_DEVICE void settle(float (&acc)[FLOATS], const Output& out, const Work& work, int32_t group, int32_t last, uint32_t mw, uint32_t tid, float* workspace) {
    // Pieces, and helpers, whose sums are under way at once: as many as there are registers for.
    constexpr uint32_t PIECES = FLOATS / 4, ROUND = PIECES < AT_ONCE ? PIECES : AT_ONCE, HELPERS = AT_ONCE / ROUND;
    constexpr uint64_t BLOCK = (uint64_t)ZS_MW * FLOATS * 128;
    const int32_t group_first = group * work.ksteps;
    float* const slot = workspace + ((mw * PIECES) * 128 + tid) * 4;
    if (last != group_first + work.ksteps - 1) {
#pragma unroll
        for (uint32_t q = 0; q < PIECES; q++) put_sum(slot + blockIdx.x * BLOCK + q * 512, {acc[4 * q], acc[4 * q + 1], acc[4 * q + 2], acc[4 * q + 3]});
        return;
    }
    uint32_t helpers = 0;  // lower blocks that hold the rest of the group
    while (work.start_of(blockIdx.x - helpers) > group_first) helpers++;
    for (uint32_t h0 = 0; h0 < helpers; h0 += HELPERS) {
#pragma unroll
        for (uint32_t q0 = 0; q0 < PIECES; q0 += ROUND) {
            Vec4 p[HELPERS][ROUND];
            float* const theirs = slot + (blockIdx.x - 1 - h0) * BLOCK + q0 * 512;
#pragma unroll
            for (uint32_t h = 0; h < HELPERS; h++)
#pragma unroll
                for (uint32_t i = 0; i < ROUND; i++)
                    if (h0 + h < helpers) p[h][i] = ld_relaxed_v4(theirs - h * BLOCK + i * 512);
#pragma unroll
            for (uint32_t h = 0; h < HELPERS; h++)
                if (h0 + h < helpers)
#pragma unroll
                    for (uint32_t i = 0; i < ROUND; i++) {
                        float* const from = theirs - h * BLOCK + i * 512;
                        while (is_empty(p[h][i])) p[h][i] = ld_relaxed_v4(from);
                        float* const v = acc + 4 * (q0 + i);
                        v[0] += as_float(p[h][i].x), v[1] += as_float(p[h][i].y), v[2] += as_float(p[h][i].z), v[3] += as_float(p[h][i].w);
                        st_relaxed_v4(from, Vec4{ZS_EMPTY, ZS_EMPTY, ZS_EMPTY, ZS_EMPTY});
                    }
        }
    }
#pragma unroll
    for (uint32_t q = 0; q < PIECES; q++)
        out.store_together({acc[4 * q], acc[4 * q + 1], acc[4 * q + 2], acc[4 * q + 3]}, ((uint32_t)group * ZS_MW + mw) * ZS_TILE + tid / 32 * 16, q * 8, tid % 32);
}

// Adds up one strip group: over the ZS_KW teams of the block that shared k, over the blocks that shared the group; writes y or publishes.
// A team is a warp (TEAM = 32) or a warpgroup (128) with a scratch of SCRATCH bytes; it holds QUADS pieces of 16 x 8 a warp, piece q at rows 16 (q / ZS_NTILES),
// tokens 8 (q mod ZS_NTILES) of the warp. Team (mw, kw) has its scratch at scratch + (mw * ZS_KW + kw) * SCRATCH. The teams that share k call this together.
template <int TEAM, int QUADS, int SCRATCH>
ZS_DEVICE void finish(const float (&acc)[QUADS][4], const Output& out, const Work& work, int32_t group, int32_t last, uint32_t scratch, uint32_t mw, uint32_t kw, uint32_t tid,
                      float* workspace) {
    constexpr uint32_t PIECE = TEAM * 16;  // bytes of one piece of all threads
    constexpr uint32_t ROUND = QUADS * PIECE < SCRATCH ? QUADS : SCRATCH / PIECE;
    const uint32_t mine = scratch + (mw * ZS_KW + kw) * SCRATCH;
    const int32_t group_first = group * work.ksteps;
    const bool owner = last == group_first + work.ksteps - 1;
    uint32_t helpers = 0;  // lower blocks that hold the rest of an owned group
    if (owner)
        while (work.start_of(blockIdx.x - helpers) > group_first) helpers++;
#pragma unroll
    for (uint32_t q0 = 0; q0 < QUADS; q0 += ROUND) {
#pragma unroll
        for (uint32_t q = 0; q < ROUND; q++) {
            const float(&v)[4] = acc[q0 + q];
            st_shared_v4(mine + q * PIECE + tid * 16, Vec4{as_bits(v[0]), as_bits(v[1]), as_bits(v[2]), as_bits(v[3])});
        }
        named_barrier_sync(7 + mw, TEAM * ZS_KW);
        // Pieces kw, kw + ZS_KW, .. of the round are this team's. All loads of one helper's sums are under way at once: one latency a helper.
        constexpr uint32_t SHARE = (ROUND + ZS_KW - 1) / ZS_KW;
        float v[SHARE][4];
#pragma unroll
        for (uint32_t i = 0; i < SHARE; i++) {
            v[i][0] = v[i][1] = v[i][2] = v[i][3] = 0.0f;
            if (kw + i * ZS_KW >= ROUND) continue;
#pragma unroll
            for (uint32_t w = 0; w < ZS_KW; w++) {
                const Vec4 p = ld_shared_v4(scratch + (mw * ZS_KW + w) * SCRATCH + (kw + i * ZS_KW) * PIECE + tid * 16);
                v[i][0] += as_float(p.x), v[i][1] += as_float(p.y), v[i][2] += as_float(p.z), v[i][3] += as_float(p.w);
            }
        }
        constexpr uint64_t BLOCK = (uint64_t)ZS_MW * QUADS * TEAM * 4;
        float* const slot = workspace + ((mw * QUADS + q0 + kw) * TEAM + tid) * 4;
        constexpr uint32_t STEP = ZS_KW * TEAM * 4;
        for (uint32_t h = 1; h <= helpers; h++) {
            float* const theirs = slot + (blockIdx.x - h) * BLOCK;
            Vec4 p[SHARE];
#pragma unroll
            for (uint32_t i = 0; i < SHARE; i++)
                if (kw + i * ZS_KW < ROUND) p[i] = ld_relaxed_v4(theirs + i * STEP);
#pragma unroll
            for (uint32_t i = 0; i < SHARE; i++) {
                if (kw + i * ZS_KW >= ROUND) continue;
                while (is_empty(p[i])) p[i] = ld_relaxed_v4(theirs + i * STEP);
                v[i][0] += as_float(p[i].x), v[i][1] += as_float(p[i].y), v[i][2] += as_float(p[i].z), v[i][3] += as_float(p[i].w);
                st_relaxed_v4(theirs + i * STEP, Vec4{ZS_EMPTY, ZS_EMPTY, ZS_EMPTY, ZS_EMPTY});
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < SHARE; i++) {
            const uint32_t q = q0 + kw + i * ZS_KW;
            if (kw + i * ZS_KW >= ROUND) continue;
            if (owner) {
                const uint32_t strip = (uint32_t)group * ZS_MW + mw;
                out.store(v[i], strip * ZS_TILE + q / ZS_NTILES * 16 + tid / 32 * 16, q % ZS_NTILES * 8, tid % 32);
            } else {
                put_sum(slot + blockIdx.x * BLOCK + i * STEP, v[i]);
            }
        }
        named_barrier_sync(7 + mw, TEAM * ZS_KW);  // the scratch may be written again
    }
}
