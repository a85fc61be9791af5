// SPDX-License-Identifier: Apache-2.0
// What the ZipGEMM kernels share: how the units of work are dealt to blocks, the warp that brings the activations, the output.
//
// A *strip* is ZS_ROWS rows of the weight. A *unit* is ZS_MW strips x ZS_KW column tiles. All units, strip groups major, are dealt to the
// blocks in equal runs (stream-K); which block sums what depends on m, k and the grid only, never on the tokens, and partial sums are
// added in a fixed order in FP32: a token's result is the same bits whatever else is in the batch.
//
// A block takes its run from the end to the beginning. The first strip group it touches may end in a later block: it publishes that partial sum early.
// The last one may begin in earlier blocks: it adds their sums, which were published long ago. A block waits only for lower block indices, so waiting ends
// whatever order the blocks are scheduled in.
#pragma once
#include "format.cuh"

#define ZS_XBYTES (ZS_KW * ZS_N * 128)  // one stage of activations
#define ZS_X_SMEM (ZS_XSTAGES * ZS_XBYTES)

// Units of one launch.
struct Work {
    int32_t strips, col_tiles, ksteps, begin, end;
    uint32_t units;
    ZS_DEVICE Work(uint32_t m, const Blob& blob) {
        strips = (int32_t)((m + ZS_ROWS - 1) / ZS_ROWS);
        col_tiles = (int32_t)blob.col_tiles;
        ksteps = (col_tiles + ZS_KW - 1) / ZS_KW;
        units = (uint32_t)((strips + ZS_MW - 1) / ZS_MW * ksteps);
        begin = start_of(blockIdx.x);
        end = start_of(blockIdx.x + 1);
    }
    // First unit of a block.
    ZS_DEVICE int32_t start_of(uint32_t block) const { return (int32_t)((uint64_t)units * block / gridDim.x); }
};

// A walk through units from the end to the beginning, with the tile of one consumer warp.
struct Cursor {
    int32_t left, kstep, strip;  // units left; column step; strip of this warp
    int32_t ktile;
    ZS_DEVICE Cursor(const Work& w, uint32_t mw, uint32_t kw) {
        left = w.end - w.begin;
        const int32_t group = (w.end - 1) / w.ksteps;
        kstep = (w.end - 1) - group * w.ksteps;
        strip = group * ZS_MW + (int32_t)mw;
        ktile = kstep * ZS_KW + (int32_t)kw;
    }
    ZS_DEVICE void advance(const Work& w) {
        left--;
        if (kstep == 0) {
            kstep = w.ksteps - 1;
            ktile += kstep * ZS_KW;
            strip -= ZS_MW;
        } else {
            kstep--;
            ktile -= ZS_KW;
        }
    }
    ZS_DEVICE bool exists(const Work& w) const { return left > 0 && ktile < w.col_tiles && strip < w.strips; }
    ZS_DEVICE uint32_t tile(const Work& w) const { return (uint32_t)strip / (ZS_TILE / ZS_ROWS) * (uint32_t)w.col_tiles + (uint32_t)ktile; }
    ZS_DEVICE uint32_t part() const { return (uint32_t)strip % (ZS_TILE / ZS_ROWS); }
};

// One 16-byte chunk of activations element by element, for rows that are not 16-byte aligned; zero where the matrix ends.
ZS_DEVICE Vec4 load_x(const uint16_t* row, uint32_t col, uint32_t k) {
    uint32_t v[4] = {0, 0, 0, 0};
#pragma unroll
    for (uint32_t i = 0; i < 8; i++)
        if (col + i < k) v[i / 2] |= (uint32_t)row[col + i] << 16 * (i & 1);
    return Vec4{v[0], v[1], v[2], v[3]};
}

// The warp that brings the activations: stage by stage, swizzled rows of 64 columns a token, [column tile][token]. It never waits for a
// copy, only for a free stage: ZS_XSTAGES stages are under way.
ZS_DEVICE void x_producer(const uint16_t* x, uint64_t ldx, uint32_t n, uint32_t k, const Work& work, uint32_t x_smem, uint32_t full, uint32_t empty, uint32_t lane) {
    for (uint32_t i = lane * 16; i < ZS_X_SMEM; i += 512) st_shared_v4(x_smem + i, Vec4{0, 0, 0, 0});
    __syncwarp();
    const bool aligned = ldx % 8 == 0 && (uint64_t)x % 16 == 0;
    const uint32_t chunks = n * (ZS_KW * 8);
    uint32_t stage = 0, parity = 1;  // a fresh barrier's previous phase counts as complete
    Cursor at(work, 0, 0);
    griddep_wait();
    for (; at.left > 0; at.advance(work)) {
        mbarrier_wait(empty + 8 * stage, parity);
        const uint32_t dst = x_smem + stage * ZS_XBYTES, col0 = (uint32_t)at.kstep * (ZS_KW * 64);
#pragma unroll 4
        for (uint32_t c = lane; c < chunks; c += 32) {
            const uint32_t row = c / (ZS_KW * 8), chunk = c % (ZS_KW * 8), col = col0 + chunk * 8;
            const uint32_t to = dst + chunk / 8 * (ZS_N * 128) + swizzle_chunk(row, chunk % 8);
            if (aligned) {
                const uint32_t bytes = col >= k ? 0 : min(16u, 2 * (k - col));
                cp_async_16_zfill(to, bytes ? x + row * ldx + col : x, bytes);
            } else {
                st_shared_v4(to, load_x(x + row * ldx, col, k));
            }
        }
        if (aligned) cp_async_mbarrier_arrive(full + 8 * stage);
        else mbarrier_arrive(full + 8 * stage);
        if (++stage == ZS_XSTAGES) stage = 0, parity ^= 1;
    }
}

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


// Adds up one strip group: over the ZS_KW teams of the block that shared k, over the blocks that shared the group; writes y or publishes.
// A team is a warp (TEAM = 32) or a warpgroup (128) with a scratch of SCRATCH bytes; it holds QUADS pieces of 16 x 8 a warp, piece q at rows 16 (q / ZS_NTILES),
// tokens 8 (q mod ZS_NTILES) of the warp. Team (mw, kw) has its scratch at scratch + (mw * ZS_KW + kw) * SCRATCH. All teams of the block call this together.
template <int TEAM, int QUADS, int SCRATCH>
ZS_DEVICE void finish(const float (&acc)[QUADS][4], const Output& out, const Work& work, int32_t group, int32_t last, uint32_t scratch, uint32_t mw, uint32_t kw, uint32_t tid,
                      float* workspace, uint32_t* flags) {
    constexpr uint32_t PIECE = TEAM * 16;  // bytes of one piece of all threads
    constexpr uint32_t ROUND = QUADS * PIECE < SCRATCH ? QUADS : SCRATCH / PIECE;
    const uint32_t lane = tid % 32, mine = scratch + (mw * ZS_KW + kw) * SCRATCH;
    const int32_t group_first = group * work.ksteps;
    const bool owner = last == group_first + work.ksteps - 1;
    int32_t helpers = 0;  // lower blocks that hold the rest of an owned group
    if (owner) {
        while (work.start_of(blockIdx.x - helpers) > group_first) helpers++;
        if (lane == 0)
            for (int32_t h = 1; h <= helpers; h++)
                while (ld_acquire_u32(flags + blockIdx.x - h) == 0) {
                }
        __syncwarp();
    }
#pragma unroll
    for (uint32_t q0 = 0; q0 < QUADS; q0 += ROUND) {
#pragma unroll
        for (uint32_t q = 0; q < ROUND; q++) {
            const float(&v)[4] = acc[q0 + q];
            st_shared_v4(mine + q * PIECE + tid * 16, Vec4{as_bits(v[0]), as_bits(v[1]), as_bits(v[2]), as_bits(v[3])});
        }
        named_barrier_sync(8 + mw, TEAM * ZS_KW);
        for (uint32_t q = kw; q < ROUND; q += ZS_KW) {
            float v[4] = {0, 0, 0, 0};
#pragma unroll
            for (uint32_t w = 0; w < ZS_KW; w++) {
                const Vec4 p = ld_shared_v4(scratch + (mw * ZS_KW + w) * SCRATCH + q * PIECE + tid * 16);
                v[0] += as_float(p.x), v[1] += as_float(p.y), v[2] += as_float(p.z), v[3] += as_float(p.w);
            }
            const uint64_t slot = ((uint64_t)(mw * QUADS + q0 + q) * TEAM + tid) * 4, block = (uint64_t)ZS_MW * QUADS * TEAM * 4;
            if (owner) {
                for (int32_t h = 1; h <= helpers; h++) {
                    const Vec4 p = ld_global_v4(workspace + (blockIdx.x - h) * block + slot);
                    v[0] += as_float(p.x), v[1] += as_float(p.y), v[2] += as_float(p.z), v[3] += as_float(p.w);
                }
                const uint32_t strip = (uint32_t)group * ZS_MW + mw;
                out.store(v, strip * ZS_ROWS + (q0 + q) / ZS_NTILES * 16 + tid / 32 * 16, (q0 + q) % ZS_NTILES * 8, lane);
            } else {
                st_global_v4(workspace + blockIdx.x * block + slot, Vec4{as_bits(v[0]), as_bits(v[1]), as_bits(v[2]), as_bits(v[3])});
            }
        }
        named_barrier_sync(8 + mw, TEAM * ZS_KW);  // the scratch may be written again
    }
    // Publish the partial sum, or hand back the flags of the ones that were read: after all teams.
    if (!owner) __threadfence();
    if (!owner || helpers > 0) {
        named_barrier_sync(15, TEAM * ZS_MW * ZS_KW);
        if (mw == 0 && kw == 0 && tid < 32) {
            if (!owner && lane == 0) st_release_u32(flags + blockIdx.x, 1);
            if (owner)
                for (int32_t h = 1 + (int32_t)lane; h <= helpers; h += 32) flags[blockIdx.x - h] = 0;
        }
    }
}
