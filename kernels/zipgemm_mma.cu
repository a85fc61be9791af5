// SPDX-License-Identifier: Apache-2.0
// zipgemm for few tokens: y[n, m] = sum_k x[n, k] * w[m, k] (+ bias[m]), w compressed; BF16 in and out, FP32 sums. sm_80 and later.
//
// The weights are read once and that is what the time goes to, so everything else is arranged around an undisturbed stream of them:
// each consumer warp streams its own tiles through registers, decodes them into its own 8 KB of shared memory and multiplies (rows = mma's M,
// tokens = mma's N). gemm.cuh says how the work is dealt out.
//
// Launch: block ZS_THREADS, grid <= min(blocks resident at once, units), dynamic shared memory ZS_GEMM_SMEM. workspace: grid * ZS_MW * 64 * ZS_N floats.
// Its bytes are 0xFF before the first launch, and every launch leaves them so. n <= ZS_N.

#ifndef ZS_N
#define ZS_N 8  // tokens, rounded up: 8, 16, 32, 64
#endif
#ifndef ZS_MW
#define ZS_MW 3  // warps side by side in m
#endif
#ifndef ZS_KW
#define ZS_KW 4  // warps side by side in k
#endif
#ifndef ZS_XSTAGES
#define ZS_XSTAGES 2
#endif
#ifndef ZS_BLOCKS
#define ZS_BLOCKS 1  // blocks a multiprocessor
#endif

#define ZS_WARPS (ZS_MW * ZS_KW)
#define ZS_THREADS (32 * ZS_WARPS)
#define ZS_NTILES (ZS_N / 8)
#define ZS_UNROLL_K (ZS_N < 64 ? 4 : 2)  // with 64 tokens there are no registers for more
#define ZS_QUADS (4 * ZS_NTILES)  // float4s a lane holds: one for each 16x8 piece of the result

#include "activations.cuh"
#include "gemm.cuh"

// Shared memory: decoded tiles | activation stages | barriers | spare bytes (Escapes::patch).
#define ZS_TILE_SMEM (ZS_WARPS * 8192)
#define ZS_GEMM_SMEM (ZS_TILE_SMEM + ZS_X_SMEM + ZS_KW * ZS_XSTAGES * 16 + ZS_WARPS * 128)

// acc += decoded tile (shared address `tile`) * activations (`x`: ZS_N rows of 64 columns).
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
        for (uint32_t t = 0; t < ZS_NTILES; t += 2) {
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
            for (uint32_t t = 0; t < ZS_NTILES; t++) mma_m16n8k16_bf16(acc[s * ZS_NTILES + t], a, b[t][0], b[t][1]);
        }
    }
}

// Adds up one strip group: over the ZS_KW warps of the block that shared k, over the blocks that shared the group; writes y or publishes.
// A warp holds ZS_QUADS pieces of 16 x 8, piece q at rows 16 (q / ZS_NTILES), tokens 8 (q mod ZS_NTILES); its decoded tile serves as scratch. The warps that share
// k call this together.
ZS_DEVICE void finish(const float (&acc)[ZS_QUADS][4], const Output& out, const Work& work, int32_t group, int32_t last, uint32_t scratch, uint32_t mw, uint32_t kw, uint32_t lane,
                      float* workspace) {
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
#pragma unroll
        for (uint32_t i = 0; i < SHARE; i++) {
            const uint32_t q = q0 + kw + i * ZS_KW;
            if (kw + i * ZS_KW >= ROUND) continue;
            if (owner) {
                const uint32_t strip = (uint32_t)group * ZS_MW + mw;
                out.store(v[i], strip * ZS_TILE + q / ZS_NTILES * 16, q % ZS_NTILES * 8, lane);
            } else {
                put_sum(slot + blockIdx.x * BLOCK + i * STEP, v[i]);
            }
        }
        named_barrier_sync(7 + mw, 32 * ZS_KW);  // the scratch may be written again
    }
}

extern "C" __global__ void __launch_bounds__(ZS_THREADS, ZS_BLOCKS)
zs_zipgemm_mma(const uint8_t* __restrict__ blob_ptr, const uint16_t* __restrict__ x, uint64_t ldx, const uint16_t* __restrict__ bias, uint16_t* __restrict__ y, uint64_t ldy,
               uint32_t m, uint32_t k, uint32_t n, float* __restrict__ workspace) {
    ZS_SMEM(smem);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Blob blob(blob_ptr, m, k);
    const Work work(blob);
    const uint32_t tiles = smem_addr(smem), xs = tiles + ZS_TILE_SMEM, bars = xs + ZS_X_SMEM, spare = bars + ZS_KW * ZS_XSTAGES * 16 + warp * 128;
    griddep_launch();

    // Consumer warp (mw, kw). Weights do not depend on the kernel before this one: start their loads before anything else. Of the tile after the present one
    // the words and escapes are under way, of the one after that the header.
    const uint32_t mw = warp / ZS_KW, kw = warp % ZS_KW, tile = tiles + warp * 8192;
    const uint8_t* const lane_escapes = blob.escapes + 4 * lane;
    Cursor at(work, blob, mw, kw), ahead = at;  // ahead: two tiles further on, in the loop
    TileStream stream;
    uint64_t head = 0, next_head = 0;
    if (ahead.exists(work)) {
        head = ld_stream_u64(ahead.header);
        stream.load(ahead.fixed, lane);
    }
    ahead.advance(work, blob);
    const uint8_t* next_fixed = ahead.exists(work) ? ahead.fixed : 0;
    if (next_fixed) next_head = ld_stream_u64(ahead.header);
    ahead.advance(work, blob);
    Escapes now;
    now.load(lane_escapes, head, lane);

    Activations acts(x, ldx, n, k, xs, bars, mw, kw, lane);
    acts.init(mw);
    __syncthreads();
    griddep_wait();
    acts.start(at, work);
    const Output out = {bias, y, ldy, m, n};
    while (at.left > 0) {
        const int32_t group = at.strip / ZS_MW, last = work.begin + at.left - 1;
        float acc[ZS_QUADS][4];
#pragma unroll
        for (uint32_t q = 0; q < ZS_QUADS; q++) acc[q][0] = acc[q][1] = acc[q][2] = acc[q][3] = 0.0f;
        const int32_t units = min(at.kstep + 1, at.left);
        for (int32_t u = 0; u < units; u++) {
            const bool exists = at.exists(work);
            const uint64_t head_after = next_head;
            const uint8_t* const fixed = next_fixed;
            next_fixed = 0, next_head = 0;
            if (ahead.exists(work)) next_fixed = ahead.fixed, next_head = ld_stream_u64(ahead.header);
            ahead.advance(work, blob);
            acts.fill();
            if (exists) {
                stream.decode(tile, now.head().base, fixed, lane);
                __syncwarp();
                now.patch(blob.escapes, tile, spare, lane);
                __syncwarp();
                multiply(acc, tile, acts.wait(), lane);
            } else {
                if (fixed) stream.load(fixed, lane);
                acts.wait();
            }
            now.load(lane_escapes, head_after, lane);
            __syncwarp();
            const uint32_t through = acts.next();
            if (lane == 0) mbarrier_arrive(through);
            at.advance(work, blob);
        }
        finish(acc, out, work, group, last, tiles, mw, kw, lane, workspace);
    }
}
