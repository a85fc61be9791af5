// SPDX-License-Identifier: Apache-2.0
// zipgemm on sm_90a: y[n, m] = sum_k x[n, k] * w[m, k] (+ bias[m]), w compressed; BF16 in and out, FP32 sums.
//
// Three kinds of warps. Decoders stream compressed tiles through registers, as decompress does, into a ring of decoded tiles in shared memory; they hold
// no sums, so their number and what they have under way do not depend on the tokens. A loader brings the activations by tensor copies. A consumer
// warpgroup multiplies what is in both rings by wgmma, whose operands come from shared memory: a few instructions a tile. gemm.cuh says how the
// work is dealt out. A tile's *place* in its unit counts down its column of tiles first, then to the right.
//
// Launch: block ZS_THREADS, grid <= min(blocks resident at once, units), dynamic shared memory ZS_GEMM_SMEM. workspace: grid * ZS_MW * 64 * ZS_N floats.
// Its bytes are 0xFF before the first launch, and every launch leaves them so. n <= ZS_N. x_map: x as n rows of k columns, boxes of n rows,
// rounded up to 8, of 64 columns in the 128-byte swizzle; x and ldx must be such that it can be made (multiples of 16 bytes).
//
// With ZS_GATED the first half of the rows of w are gates, m is a multiple of 128, a unit is two strips, one of each half, and y is n x m / 2: silu(gate) * up.
#define ZS_WGMMA 1
#define ZS_ESCAPE_WORDS 4

#ifndef ZS_N
#define ZS_N 128  // tokens, rounded up: 8, 16, 32, 64, 128
#endif
#ifndef ZS_MW
#define ZS_MW 2  // tiles of a unit in m
#endif
#ifndef ZS_KW
#define ZS_KW 1  // tiles of a unit in k
#endif
#ifndef ZS_GATED
#define ZS_GATED 0
#endif
#ifndef ZS_DECODERS
#define ZS_DECODERS 11  // warps
#endif
#ifndef ZS_STAGES
#define ZS_STAGES 12  // decoded tiles in the ring; whole units, two at least, and not below ZS_DECODERS
#endif
#ifndef ZS_XSTAGES
#define ZS_XSTAGES 3  // units of activations in their ring
#endif
// Registers a thread of a consumer, and of the others, where a consumer has more than 64 sums; 0: all keep as many as they were launched with.
#define ZS_CONSUMER_REGISTERS (ZS_N / 2 * ZS_MW > 64 ? 200 : 0)
#define ZS_DECODER_REGISTERS 104
#ifndef ZS_LEAD
#define ZS_LEAD 2
#endif
#ifndef ZS_IN_STEP
#define ZS_IN_STEP 0  // 1: blocks whose runs begin anywhere in k are at few places in k at any time, and get the same activations from L2 together (walk.cuh)
#endif
#ifndef ZS_SPREAD
#define ZS_SPREAD 0  // clocks between the first loads of one decoder and of the next
#endif
#define ZS_CLUSTER 1
#define ZS_NTILES (ZS_N / 8)

#define ZS_CONSUMERS 128  // threads: a warpgroup
#define ZS_THREADS ((ZS_CONSUMERS + 32 * ZS_DECODERS + 32 + 127) / 128 * 128)  // with the loader; the compiler counts registers in whole warpgroups
// Pieces of partial sums that a consumer reads at a time: what is left of its registers, if whole warpgroups are counted.
#define ZS_REGISTERS (ZS_CONSUMER_REGISTERS ? ZS_CONSUMER_REGISTERS : 65536 / ZS_THREADS)
#define ZS_SPARE_REGISTERS (ZS_REGISTERS - ZS_N / 2 * ZS_MW - 28)
#define ZS_PIECES_AT_ONCE (ZS_SPARE_REGISTERS >= 72 ? 16 : ZS_SPARE_REGISTERS >= 32 ? 8 : ZS_SPARE_REGISTERS >= 16 ? 4 : 2)
#define ZS_XBOX (ZS_N * 128)              // bytes of the activations of one column of tiles
#define ZS_XBYTES (ZS_KW * ZS_XBOX)
#define ZS_LAG (ZS_MW * ZS_KW > 1 ? 2 : 1)  // tiles whose wgmma may be under way while a warpgroup goes on to the next

#include "walk.cuh"

// Shared memory: decoded tiles | activations | barriers (a full and an empty one a stage) | spare bytes of the decoders (Escapes::patch). The first two need
// 1024-byte alignment.
#define ZS_TILE_SMEM (ZS_STAGES * 8192)
#define ZS_BARRIERS (ZS_TILE_SMEM + ZS_XSTAGES * ZS_XBYTES)
#define ZS_SPARE (ZS_BARRIERS + (ZS_STAGES + ZS_XSTAGES) * 16)
#define ZS_GEMM_SMEM (ZS_SPARE + ZS_DECODERS * 128)

// A barrier tells only the last two rounds apart, so a decoder must not come to a stage before the round ahead of its own has begun. It was last let into
// the ring ZS_DECODERS tiles ago, by the consumers, who read tiles in order: they have read all tiles up to ZS_DECODERS + ZS_STAGES
// before this one, so the round is well past if that is no more than two rounds back.
static_assert(ZS_STAGES % ZS_PLACES == 0 && ZS_STAGES >= ZS_DECODERS && ZS_STAGES >= 2 * ZS_PLACES, "see above");

static_assert(!ZS_CONSUMER_REGISTERS || ZS_CONSUMERS * ZS_CONSUMER_REGISTERS + (ZS_THREADS - ZS_CONSUMERS) * ZS_DECODER_REGISTERS <= 65536, "registers of a multiprocessor");
static_assert(ZS_STAGES > ZS_LAG + 1 && ZS_XSTAGES >= 2, "the rings hold more than what is handed back late");

// Decoder warp d takes tiles d, d + ZS_DECODERS, .. of the walk. Weights do not depend on the kernel before this one, so it does not wait for that. Of the tile
// after the present one the words and escapes are under way, of the one after that the header.
ZS_DEVICE void decode_tiles(const Blob& blob, const Work& work, uint32_t d, uint32_t lane, uint32_t smem) {
    Walk ahead(work, d);
    int32_t left = ((work.end - work.begin) * ZS_PLACES - (int32_t)d + ZS_DECODERS - 1) / ZS_DECODERS;  // tiles
    // Of the tile at `ahead` its place and header, if it is one of the matrix.
    const uint8_t* next_fixed;
    uint64_t next_head;
    auto look = [&] {
        next_fixed = 0, next_head = 0;
        if (ahead.exists(work)) {
            const uint64_t tile = ahead.weight_tile(work);
            next_fixed = blob.fixed + tile * ZS_FIXED, next_head = ld_stream_u64(blob.headers + tile * 8);
        }
        ahead.advance(work, ZS_DECODERS);
    };
    TileStream stream;
    Escapes escapes;
    look();
    bool exists = next_fixed != 0;
    pause_clocks(d * ZS_SPREAD);
    if (exists) stream.load(next_fixed, lane);
    __syncthreads();  // the barriers are there, and all first loads are out
    // All blocks have asked for their first tiles at once, and decode them at once: something is to be under way from memory meanwhile. The second tiles come behind the
    // first ones, whose headers are not waited for.
    if (lane == 0 && ahead.exists(work)) prefetch_l2(blob.fixed + (uint64_t)ahead.weight_tile(work) * ZS_FIXED, ZS_FIXED);
    escapes.load(blob.escapes + 4 * lane, next_head, lane);
    look();

    Stage stage(d);
    for (; left > 0; left--) {
        const uint32_t tile = smem + stage.index * 8192, full = smem + ZS_BARRIERS + stage.index * 16;
        mbarrier_wait(full + 8, stage.parity ^ 1);
        if (exists) {
            stream.decode(tile, escapes.head().base, next_fixed, lane);
            __syncwarp();
            escapes.patch(blob.escapes, tile, smem + ZS_SPARE + d * 128, lane);
        } else {  // outside the matrix: zeros, so that no branch stands around wgmma
            for (uint32_t i = 0; i < 8192; i += 512) st_shared_v4(tile + i + lane * 16, Vec4{0, 0, 0, 0});
            if (next_fixed) stream.load(next_fixed, lane);
        }
        fence_proxy_async();  // wgmma reads what ordinary stores wrote
        __syncwarp();
        if (lane == 0) mbarrier_arrive(full);
        exists = next_fixed != 0;
        escapes.load(blob.escapes + 4 * lane, next_head, lane);
        look();
        stage.advance(ZS_DECODERS, ZS_STAGES);
    }
}

// Rows of a tensor copy: rows beyond x would be filled with zeros, which takes the copy engine longer than reading them.
ZS_DEVICE uint32_t box_rows(uint32_t n) { return min((uint32_t)ZS_N, (n + 7) / 8 * 8); }

// The rows that no copy brings.
ZS_DEVICE void clear_activations(uint32_t rows, uint32_t tid, uint32_t smem) {
    if (rows == ZS_N) return;
    for (uint32_t box = 0; box < ZS_XSTAGES * ZS_KW; box++)
        for (uint32_t i = rows * 128 + tid * 16; i < ZS_XBOX; i += ZS_CONSUMERS * 16) st_shared_v4(smem + ZS_TILE_SMEM + box * ZS_XBOX + i, Vec4{0, 0, 0, 0});
    fence_proxy_async();
}

// One thread brings the activations of every unit.
ZS_DEVICE void load_activations(const TensorMap& x_map, const uint16_t* x, uint64_t ldx, uint32_t n, uint32_t k, const Work& work, uint32_t smem) {
    const uint32_t rows = box_rows(n);
    Stage stage(0);
    for (Walk at(work, 0); at.left > 0; at.advance(work, ZS_PLACES)) {
        const uint32_t full = smem + ZS_BARRIERS + (ZS_STAGES + stage.index) * 16, to = smem + ZS_TILE_SMEM + stage.index * ZS_XBYTES;
        mbarrier_wait(full + 8, stage.parity ^ 1);
        mbarrier_arrive_expect_tx(full, ZS_KW * rows * 128);
#pragma unroll
        for (uint32_t i = 0; i < ZS_KW; i++) tensor_copy(to + i * ZS_XBOX, x_map, TensorRows{x, ldx, n, k, rows}, (uint32_t)(at.kstep * ZS_KW + i) * 64, 0, full);
        stage.advance(1, ZS_XSTAGES);
    }
}

// The consumers multiply the tiles of every unit. Stages are handed back ZS_LAG tiles late, when wgmma has read them.
ZS_DEVICE void multiply_tiles(const Work& work, const Output& out, uint32_t tid, uint32_t smem, float* workspace) {
    const uint32_t bars = smem + ZS_BARRIERS, xbars = bars + ZS_STAGES * 16;
    const bool signals = tid % 32 == 0;
    Stage stage(0), xstage(0);
    Walk at(work, 0);
    while (at.left > 0) {
        const int32_t units = at.piece;
        float acc[ZS_MW][ZS_N / 2];
#pragma unroll
        for (uint32_t i = 0; i < ZS_MW; i++)
#pragma unroll
            for (uint32_t j = 0; j < ZS_N / 2; j++) acc[i][j] = 0.0f;
        uint32_t busy[ZS_LAG] = {}, xbusy[ZS_LAG] = {};  // barriers of the tiles under way, and of the activations where a tile is the last to read them
        for (int32_t u = 0; u < units; u++) {
            const uint32_t unit = bars + stage.index * 16, xfull = xbars + xstage.index * 16;
            const uint32_t tiles = smem + stage.index * 8192, xs = smem + ZS_TILE_SMEM + xstage.index * ZS_XBYTES;
            mbarrier_wait(xfull, xstage.parity);
#pragma unroll
            for (uint32_t place = 0; place < ZS_PLACES; place++) {
                mbarrier_wait(unit + place * 16, stage.parity);
                const uint32_t a = wgmma_start(tiles + place * 8192), b = wgmma_start(xs + place / ZS_MW * ZS_XBOX);
                wgmma_tile<ZS_N>(acc[place % ZS_MW], a, b);
                wgmma_wait<ZS_LAG>();
                __syncwarp();
                if (signals && busy[0]) mbarrier_arrive(busy[0] + 8);
                if (signals && xbusy[0]) mbarrier_arrive(xbusy[0] + 8);
#pragma unroll
                for (uint32_t i = 1; i < ZS_LAG; i++) busy[i - 1] = busy[i], xbusy[i - 1] = xbusy[i];
                busy[ZS_LAG - 1] = unit + place * 16, xbusy[ZS_LAG - 1] = place == ZS_PLACES - 1 ? xfull : 0;
            }
            stage.advance(ZS_PLACES, ZS_STAGES);
            xstage.advance(1, ZS_XSTAGES);
        }
        wgmma_wait<0>();
        __syncwarp();
#pragma unroll
        for (uint32_t i = 0; i < ZS_LAG; i++) {
            if (signals && busy[i]) mbarrier_arrive(busy[i] + 8);
            if (signals && xbusy[i]) mbarrier_arrive(xbusy[i] + 8);
        }
        bool all = true;
#pragma unroll
        for (uint32_t i = 0; i < ZS_MW; i++) {
            wgmma_pin(acc[i]);
            all = settle(acc[i], work, at, i, tid, workspace);
            if (all && !ZS_GATED) out.store_rows<ZS_N / 8>(acc[i], ((uint32_t)at.strip0 + i) * ZS_TILE + tid / 32 * 16, tid % 32);
        }
#if ZS_GATED
        static_assert(ZS_MW == 2, "see above");
        if (all) {
            const uint32_t rows = (uint32_t)at.strip0 / 2 * ZS_TILE + tid / 32 * 16;
            apply_gates(acc[0], acc[1], out.bias, rows + tid % 32 / 4, out.m);
            Output{nullptr, out.y, out.ldy, out.m, out.n}.store_rows<ZS_N / 8>(acc[0], rows, tid % 32);
        }
#endif
        at.advance(work, (uint32_t)units * ZS_PLACES);
    }
}

extern "C" __global__ void __launch_bounds__(ZS_THREADS, 1)
zs_zipgemm_wgmma(const uint8_t* __restrict__ blob_ptr, const uint16_t* __restrict__ x, uint64_t ldx, const uint16_t* __restrict__ bias, uint16_t* __restrict__ y, uint64_t ldy,
                 uint32_t m, uint32_t k, uint32_t n, float* __restrict__ workspace, const __grid_constant__ TensorMap x_map) {
    ZS_SMEM(smem_ptr);
    const uint32_t warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0), lane = threadIdx.x % 32, smem = smem_addr(smem_ptr);
    const Blob blob(blob_ptr, m, k);
    const Work work(blob);
    griddep_launch();
    if (warp >= ZS_CONSUMERS / 32) {
#if ZS_CONSUMER_REGISTERS
        setmaxnreg_dec<ZS_DECODER_REGISTERS>();
#endif
        if (warp < ZS_CONSUMERS / 32 + ZS_DECODERS) {
            decode_tiles(blob, work, warp - ZS_CONSUMERS / 32, lane, smem);
        } else {
            __syncthreads();  // the barriers are there
            griddep_wait();
            if (warp == ZS_CONSUMERS / 32 + ZS_DECODERS && lane == 0) load_activations(x_map, x, ldx, n, k, work, smem);
        }
    } else {
#if ZS_CONSUMER_REGISTERS
        setmaxnreg_inc<ZS_CONSUMER_REGISTERS>();
#endif
        if (threadIdx.x == 0) {
            for (uint32_t s = 0; s < ZS_STAGES + ZS_XSTAGES; s++) {
                mbarrier_init(smem + ZS_BARRIERS + s * 16, 1);
                mbarrier_init(smem + ZS_BARRIERS + s * 16 + 8, 4);
            }
            fence_mbarrier_init();
        }
        clear_activations(box_rows(n), threadIdx.x, smem);
        __syncthreads();
        griddep_wait();
        multiply_tiles(work, Output{bias, y, ldy, ZS_GATED ? m / 2 : m, n}, threadIdx.x, smem, workspace);
    }
}
