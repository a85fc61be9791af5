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

#include "mma.cuh"
#include "activations.cuh"

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
        finish(acc, out, work, group, (uint32_t)group * ZS_MW + mw, last, tiles, mw, kw, lane, workspace);
    }
}
