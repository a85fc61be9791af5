// SPDX-License-Identifier: Apache-2.0
// What the kernels over mma.sync share: a warp multiplies its decoded tile, the warps and blocks that shared a strip group add up.
//
// A kernel says before it includes this: ZS_N (tokens of an output tile), ZS_MW and ZS_KW (warps side by side in m and in k), ZS_XSTAGES.
#pragma once

#ifndef ZS_GATED
#define ZS_GATED 0  // 1: of two warps side by side in m one has gates, the other what they are for; the result is silu(gate) * up
#endif

#define ZS_WARPS (ZS_MW * ZS_KW)
#define ZS_THREADS (32 * ZS_WARPS)
#define ZS_NTILES (ZS_N / 8)
#define ZS_UNROLL_K (ZS_N < 64 ? 4 : 2)  // with 64 tokens there are no registers for more
#define ZS_QUADS (4 * ZS_NTILES)  // float4s a lane holds: one for each 16x8 piece of the result

// A row of 64 columns of activations has 16 bytes more, so that ldmatrix reads eight rows without bank conflicts.
#define ZS_XROW 144
#define ZS_XBYTES (ZS_N * ZS_XROW)  // one stage of one kw
#define ZS_X_SMEM (ZS_KW * ZS_XSTAGES * ZS_XBYTES)
#define ZS_XROWS (ZS_MW * 32 / 8)  // rows that the warps copy at a time, eight lanes a row

// Shared memory: decoded tiles | activation stages | barriers | spare bytes (Escapes::patch).
#define ZS_TILE_SMEM (ZS_WARPS * 8192)
#define ZS_GEMM_SMEM (ZS_TILE_SMEM + ZS_X_SMEM + ZS_KW * ZS_XSTAGES * 16 + ZS_WARPS * 128)

#include "gemm.cuh"

// Eight columns from `col` on, which `src` points to, element by element; zero where the matrix ends.
ZS_DEVICE Vec4 load_x(const uint16_t* src, uint32_t col, uint32_t k) {
    uint32_t v[4] = {0, 0, 0, 0};
#pragma unroll
    for (uint32_t i = 0; i < 8; i++)
        if (col + i < k) v[i / 2] |= (uint32_t)src[i] << 16 * (i & 1);
    return Vec4{v[0], v[1], v[2], v[3]};
}

// acc += decoded tile (shared address `tile`) * activations (`x`: ZS_N rows of 64 columns, of which the first 8 * TILES count).
template <uint32_t TILES = ZS_NTILES>
ZS_DEVICE void multiply(float (&acc)[ZS_QUADS][4], uint32_t tile, uint32_t x, uint32_t lane) {
    const uint32_t a_row = lane & 15, a_chunk = lane >> 4, b_row = lane & 7, b_matrix = lane >> 3;
#pragma unroll ZS_UNROLL_K
    for (uint32_t j = 0; j < 4; j++) {  // 16 columns each
        uint32_t b[ZS_NTILES][2];
#if ZS_N == 8
        static_assert(ZS_NTILES == 1, "one ldmatrix brings two steps");
        uint32_t r[4];
        ldmatrix_x4(r, x + b_row * ZS_XROW + (4 * (j / 2) + b_matrix) * 16);
        b[0][0] = r[2 * (j & 1)];
        b[0][1] = r[2 * (j & 1) + 1];
#else
#pragma unroll
        for (uint32_t t = 0; t < TILES; t += 2) {
            uint32_t r[4];
            ldmatrix_x4(r, x + (8 * (t + b_matrix / 2) + b_row) * ZS_XROW + (2 * j + (b_matrix & 1)) * 16);
            b[t][0] = r[0], b[t][1] = r[1], b[t + 1][0] = r[2], b[t + 1][1] = r[3];
        }
#endif
#pragma unroll
        for (uint32_t s = 0; s < 4; s++) {
            uint32_t a[4];
            ldmatrix_x4(a, tile + s * 2048 + swizzle_chunk(a_row, 2 * j + a_chunk));
#pragma unroll
            for (uint32_t t = 0; t < TILES; t++) mma_m16n8k16_bf16(acc[s * ZS_NTILES + t], a, b[t][0], b[t][1]);
        }
    }
}

#if ZS_GATED
// Four gates become silu(gate) * up.
ZS_DEVICE void apply_gate(float (&v)[4], const Vec4& up) {
    apply_gates(v[0], v[1], pack_bf16(v[0], v[1]), pack_bf16(as_float(up.x), as_float(up.y)));
    apply_gates(v[2], v[3], pack_bf16(v[2], v[3]), pack_bf16(as_float(up.z), as_float(up.w)));
}
#endif

// Adds up one strip group: over the ZS_KW warps of the block that shared k, over the blocks that shared the group; writes y or publishes.
// A warp holds ZS_QUADS pieces of 16 x 8, piece q at rows 16 (q / ZS_NTILES), tokens 8 (q mod ZS_NTILES); its decoded tile serves as scratch. The warps that share
// k call this together.
template <class Out, class Dealt>
ZS_DEVICE void finish(const float (&acc)[ZS_QUADS][4], const Out& out, const Dealt& work, int32_t group, uint32_t strip, int32_t last, uint32_t scratch, uint32_t mw, uint32_t kw,
                      uint32_t lane, float* workspace) {
    constexpr uint32_t SCRATCH = 8192, QUADS = ZS_QUADS;
    constexpr uint32_t PIECE = 32 * 16;  // bytes of one piece of all lanes
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
            st_shared_v4(mine + q * PIECE + lane * 16, Vec4{as_bits(v[0]), as_bits(v[1]), as_bits(v[2]), as_bits(v[3])});
        }
        named_barrier_sync(7 + mw, 32 * ZS_KW);
        // Pieces kw, kw + ZS_KW, .. of the round are this warp's. All loads of one helper's sums are under way at once: one latency a helper.
        constexpr uint32_t SHARE = (ROUND + ZS_KW - 1) / ZS_KW;
        float v[SHARE][4];
#pragma unroll
        for (uint32_t i = 0; i < SHARE; i++) {
            v[i][0] = v[i][1] = v[i][2] = v[i][3] = 0.0f;
            if (kw + i * ZS_KW >= ROUND) continue;
#pragma unroll
            for (uint32_t w = 0; w < ZS_KW; w++) {
                const Vec4 p = ld_shared_v4(scratch + (mw * ZS_KW + w) * SCRATCH + (kw + i * ZS_KW) * PIECE + lane * 16);
                v[i][0] += as_float(p.x), v[i][1] += as_float(p.y), v[i][2] += as_float(p.z), v[i][3] += as_float(p.w);
            }
        }
        constexpr uint64_t BLOCK = (uint64_t)ZS_MW * QUADS * 32 * 4;
        float* const slot = workspace + ((mw * QUADS + q0 + kw) * 32 + lane) * 4;
        constexpr uint32_t STEP = ZS_KW * 32 * 4;
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
#if ZS_GATED
        if (owner) {  // in all warps or in none
            named_barrier_sync(7 + mw, 32 * ZS_KW);  // the scratch has been read
            const uint32_t ups = scratch + ((mw | 1) * ZS_KW + kw) * SCRATCH + lane * 16;
            if (mw & 1) {
#pragma unroll
                for (uint32_t i = 0; i < SHARE; i++)
                    if (kw + i * ZS_KW < ROUND) st_shared_v4(ups + i * PIECE, Vec4{as_bits(v[i][0]), as_bits(v[i][1]), as_bits(v[i][2]), as_bits(v[i][3])});
            }
            named_barrier_sync(11 + mw / 2, 64 * ZS_KW);
            if (!(mw & 1)) {
#pragma unroll
                for (uint32_t i = 0; i < SHARE; i++)
                    if (kw + i * ZS_KW < ROUND) apply_gate(v[i], ld_shared_v4(ups + i * PIECE));
            }
            named_barrier_sync(11 + mw / 2, 64 * ZS_KW);  // the scratch may be written again
        }
#endif
#pragma unroll
        for (uint32_t i = 0; i < SHARE; i++) {
            const uint32_t q = q0 + kw + i * ZS_KW;
            if (kw + i * ZS_KW >= ROUND) continue;
            if (owner) {
                if (ZS_GATED && (mw & 1)) continue;
                out.store(v[i], strip * ZS_TILE + q / ZS_NTILES * 16, q % ZS_NTILES * 8, lane);
            } else {
                put_sum(slot + blockIdx.x * BLOCK + i * STEP, v[i]);
            }
        }
        named_barrier_sync(7 + mw, 32 * ZS_KW);  // the scratch may be written again
    }
}
