// SPDX-License-Identifier: Apache-2.0
// zipgemm for few tokens: y[n, m] = sum_k x[n, k] * w[m, k] (+ bias[m]), w compressed; BF16 in and out, FP32 sums. sm_80 and later.
//
// The weights are read once and that is what the time goes to, so everything else is arranged around an undisturbed stream of them:
// each consumer warp streams, decodes and multiplies its own part of the tiles (rows = mma's M, tokens = mma's N); one more warp brings
// the activations. A *unit* is ZS_MW strips of ZS_ROWS rows x ZS_KW column tiles, one strip part a warp. All units, strip groups major, are
// dealt to the blocks in equal runs (stream-K); which block sums what depends on m, k and the grid only, never on n, and partial sums are
// added in a fixed order in FP32: a token's result is the same bits whatever else is in the batch.
//
// A block takes its run from the end to the beginning. The first strip group it touches may end in a later block: it publishes that partial sum early.
// The last one may begin in earlier blocks: it adds their sums, which were published long ago. A block waits only for lower block indices, so waiting ends
// whatever order the blocks are scheduled in.
//
// Launch: block ZS_THREADS, any grid <= blocks resident at once, dynamic shared memory ZS_GEMM_SMEM. workspace: grid * ZS_MW * ZS_ROWS * ZS_N floats.
// flags: grid words, zero before the first launch; every launch leaves them zero. n <= ZS_N.

#ifndef ZS_N
#define ZS_N 8        // tokens, rounded up: 8, 16, 32, 64
#endif
#ifndef ZS_ROWS
#define ZS_ROWS 64    // rows a warp takes of a tile: 64, 32, 16
#endif
#ifndef ZS_MW
#define ZS_MW 2       // warps side by side in m
#endif
#ifndef ZS_KW
#define ZS_KW 4       // warps side by side in k
#endif
#ifndef ZS_STAGES
#define ZS_STAGES 3
#endif
#ifndef ZS_XSTAGES
#define ZS_XSTAGES 2
#endif

#define ZS_WARPS (ZS_MW * ZS_KW)
#define ZS_THREADS (32 * (ZS_WARPS + 1))
#define ZS_SUBTILES (ZS_ROWS / 16)
#define ZS_NTILES (ZS_N / 8)
#define ZS_QUADS (ZS_SUBTILES * ZS_NTILES)  // float4s a lane holds: one for each 16x8 piece of the result

#include "gemm.cuh"
#include "stream.cuh"

typedef TileRing<ZS_ROWS, ZS_STAGES> Ring;

// Shared memory: decoded tiles | weight stages | activation stages | barriers.
#define ZS_TILE_SMEM (ZS_WARPS * ZS_ROWS * 128)
#define ZS_RING_SMEM (ZS_WARPS * Ring::SMEM)
#define ZS_GEMM_SMEM (ZS_TILE_SMEM + ZS_RING_SMEM + ZS_X_SMEM + ZS_WARPS * 64 + 256)

// acc += decoded tile (shared address `tile`, ZS_ROWS rows) * activations (`x`, ZS_N tokens x 64 columns).
ZS_DEVICE void multiply(float (&acc)[ZS_QUADS][4], uint32_t tile, uint32_t x, uint32_t lane) {
    const uint32_t a_row = lane & 15, a_chunk = lane >> 4, b_row = lane & 7, b_matrix = lane >> 3;
#pragma unroll
    for (uint32_t j = 0; j < 4; j++) {  // 16 columns each
        uint32_t b[ZS_NTILES][2];
#if ZS_N == 8
        static_assert(ZS_NTILES == 1, "one ldmatrix brings two steps");
        uint32_t r[4];
        ldmatrix_x4(r, x + swizzle_chunk(b_row, 4 * (j / 2) + b_matrix));
        b[0][0] = r[2 * (j & 1)];
        b[0][1] = r[2 * (j & 1) + 1];
#else
#pragma unroll
        for (uint32_t t = 0; t < ZS_NTILES; t += 2) {
            uint32_t r[4];
            ldmatrix_x4(r, x + swizzle_chunk(8 * (t + b_matrix / 2) + b_row, 2 * j + (b_matrix & 1)));
            b[t][0] = r[0], b[t][1] = r[1], b[t + 1][0] = r[2], b[t + 1][1] = r[3];
        }
#endif
#pragma unroll
        for (uint32_t s = 0; s < ZS_SUBTILES; s++) {
            uint32_t a[4];
            ldmatrix_x4(a, tile + s * 2048 + swizzle_chunk(a_row, 2 * j + a_chunk));
#pragma unroll
            for (uint32_t t = 0; t < ZS_NTILES; t++) mma_m16n8k16_bf16(acc[s * ZS_NTILES + t], a, b[t][0], b[t][1]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(ZS_THREADS, 1)
zs_zipgemm_mma(const uint8_t* __restrict__ blob_ptr, const uint16_t* __restrict__ x, uint64_t ldx, const uint16_t* __restrict__ bias, uint16_t* __restrict__ y, uint64_t ldy,
               uint32_t m, uint32_t k, uint32_t n, float* __restrict__ workspace, uint32_t* __restrict__ flags) {
    ZS_SMEM(smem);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Blob blob(blob_ptr, m, k);
    const Work work(m, blob);
    const uint32_t tiles = smem_addr(smem), rings = tiles + ZS_TILE_SMEM, xs = rings + ZS_RING_SMEM, bars = xs + ZS_X_SMEM;
    const uint32_t x_full = bars + ZS_WARPS * 64, x_empty = x_full + 8 * ZS_XSTAGES;
    if (threadIdx.x == 0) {
        for (uint32_t s = 0; s < ZS_XSTAGES; s++) {
            mbarrier_init(x_full + 8 * s, 32);
            mbarrier_init(x_empty + 8 * s, ZS_WARPS);
        }
    }
    griddep_launch();

    if (warp == ZS_WARPS) {
        __syncthreads();
        x_producer(x, ldx, n, k, work, xs, x_full, x_empty, lane);
        return;
    }

    // Consumer warp (mw, kw). Weights do not depend on the kernel before this one: start their copies before anything else.
    const uint32_t mw = warp / ZS_KW, kw = warp % ZS_KW, tile = tiles + warp * (ZS_ROWS * 128);
    Ring ring(rings + warp * Ring::SMEM, bars + warp * 64, lane);
    Cursor ahead(work, mw, kw);
    uint64_t heads[ZS_STAGES];  // tile headers of the tiles in the ring, oldest first
#pragma unroll
    for (uint32_t s = 0; s < ZS_STAGES; s++) {
        heads[s] = 0;
        if (ahead.exists(work)) {
            heads[s] = ld_stream_u64(blob.headers + (uint64_t)ahead.tile(work) * 8);
            ring.fill(blob.fixed + (uint64_t)ahead.tile(work) * ZS_FIXED, ahead.part());
        } else {
            ring.fill_none();
        }
        ahead.advance(work);
    }
    Escapes now;
    now.load(blob.escapes, TileHeader(heads[0]), lane);
    __syncthreads();

    Cursor at(work, mw, kw);
    uint32_t x_stage = 0, x_parity = 0;
    const Output out = {bias, y, ldy, m, n};
    while (at.left > 0) {
        const int32_t group = at.strip / ZS_MW, last = work.begin + at.left - 1;
        float acc[ZS_QUADS][4];
#pragma unroll
        for (uint32_t q = 0; q < ZS_QUADS; q++) acc[q][0] = acc[q][1] = acc[q][2] = acc[q][3] = 0.0f;
        bool more = true;
        while (more) {
            const bool exists = at.exists(work);
            Escapes next;
            next.load(blob.escapes, TileHeader(heads[1]), lane);
#pragma unroll
            for (uint32_t s = 0; s + 1 < ZS_STAGES; s++) heads[s] = heads[s + 1];
            heads[ZS_STAGES - 1] = ahead.exists(work) ? ld_stream_u64(blob.headers + (uint64_t)ahead.tile(work) * 8) : 0;
            if (exists) {
                ring.decode(ring.wait(), tile, now.head.base);
                __syncwarp();
                ring.release();
            }
            if (ahead.exists(work)) ring.fill(blob.fixed + (uint64_t)ahead.tile(work) * ZS_FIXED, ahead.part());
            else ring.fill_none();
            if (exists) now.patch(blob.escapes, tile, lane, at.part() * ZS_ROWS, ZS_ROWS);
            __syncwarp();
            mbarrier_wait(x_full + 8 * x_stage, x_parity);
            if (exists) multiply(acc, tile, xs + x_stage * ZS_XBYTES + kw * (ZS_N * 128), lane);
            __syncwarp();
            if (lane == 0) mbarrier_arrive(x_empty + 8 * x_stage);
            if (++x_stage == ZS_XSTAGES) x_stage = 0, x_parity ^= 1;
            ahead.advance(work);
            now = next;
            more = at.kstep > 0 && at.left > 1;
            at.advance(work);
        }
        griddep_wait();
        finish<32, ZS_QUADS, ZS_ROWS * 128>(acc, out, work, group, last, tiles, mw, kw, lane, workspace, flags);
    }
}
