// SPDX-License-Identifier: Apache-2.0
// zipgemm on sm_90a for many tokens: y[n, m] = sum_k x[n, k] * w[m, k] (+ bias[m]), w compressed; BF16 in and out, FP32 sums.
//
// An output tile is ZS_GROUPS strips by ZS_N tokens, a warpgroup for each strip. While the tensor cores work on one unit (two tiles of each strip), its warps
// decode the unit after the next one, each its 16 rows of both tiles. A further warp for each strip then puts in the escapes. One more brings the activations
// by tensor copies; the blocks of a cluster have neighbouring strips of the same tokens and bring each other's, so that they come once from L2. tiles.cuh
// says which block makes what.
//
// Launch: block ZS_THREADS, clusters of ZS_CLUSTER, grid <= min(blocks resident at once, ZS_CLUSTER * units), where the units are those of all output tiles: every
// cluster has one at least. Dynamic shared memory ZS_GEMM_SMEM.
// workspace: grid * ZS_GROUPS * 64 * ZS_N floats. Its bytes are 0xFF before the first launch, and every launch leaves them so. x_map: x as n rows of k
// columns, boxes of ZS_N / ZS_CLUSTER rows of 64 columns, also where n is less, in the 128-byte swizzle; x and ldx must be such that it can be made (multiples of
// 16 bytes).
#define ZS_WGMMA 1

#ifndef ZS_N
#define ZS_N 256  // tokens of an output tile: 8 * ZS_CLUSTER to 256, a power of two (a box has whole groups of eight rows). The plans take multiples of 64
#endif
#ifndef ZS_GROUPS
#define ZS_GROUPS 2  // consumer warpgroups: 1 to 3
#endif
#ifndef ZS_XSTAGES
#define ZS_XSTAGES 2  // units of activations in their ring
#endif
#ifndef ZS_CLUSTER
#define ZS_CLUSTER 2  // blocks of a cluster: 1, 2
#endif
#define ZS_MW ZS_GROUPS
#define ZS_KW 2
#define ZS_TOKEN_TILES 1
#define ZS_NTILES (ZS_N / 8)

#define ZS_CONSUMERS (128 * ZS_GROUPS)  // threads
#define ZS_THREADS (ZS_CONSUMERS + 128)  // with the loader; registers are dealt to whole warpgroups
// Registers a thread: of the loader's warpgroup, and of the consumers, which get what the loader does not need.
#ifndef ZS_LOADER_REGISTERS
#define ZS_LOADER_REGISTERS 56
#endif
#define ZS_LAUNCH_REGISTERS (65536 / ZS_THREADS / 8 * 8)
#define ZS_FREE_REGISTERS ((ZS_LAUNCH_REGISTERS * ZS_THREADS - 128 * ZS_LOADER_REGISTERS) / ZS_CONSUMERS / 8 * 8)
#define ZS_CONSUMER_REGISTERS (ZS_FREE_REGISTERS > 232 ? 232 : ZS_FREE_REGISTERS)
#define ZS_SPARE_REGISTERS (ZS_CONSUMER_REGISTERS - ZS_N / 2 - 40)
#define ZS_PIECES_AT_ONCE (ZS_SPARE_REGISTERS >= 80 ? 16 : ZS_SPARE_REGISTERS >= 56 ? 8 : 4)
#define ZS_XBOX (ZS_N * 128)  // bytes of the activations of one column of tiles
#define ZS_XBYTES (ZS_KW * ZS_XBOX)

#include "tiles.cuh"

// Shared memory: a ring of decoded units | activations | barriers | spare bytes of the warps that put in escapes. The barriers: a full and an empty one for each
// column of activations; for each decoded unit and strip one that its warps have decoded it, and one that its escapes are in.
#define ZS_STAGES 3
#define ZS_UNIT (ZS_PLACES * 8192)
#define ZS_TILE_SMEM (ZS_STAGES * ZS_UNIT)
#define ZS_BARRIERS (ZS_TILE_SMEM + ZS_XSTAGES * ZS_XBYTES)
#define ZS_DECODED (ZS_BARRIERS + ZS_XSTAGES * ZS_KW * 16)
#define ZS_SPARE (ZS_DECODED + ZS_STAGES * ZS_GROUPS * 16)
#define ZS_GEMM_SMEM (ZS_SPARE + ZS_GROUPS * 128)

// One thread brings the activations of every unit.
ZS_DEVICE void load_activations(const TensorMap& x_map, const uint16_t* x, uint64_t ldx, uint32_t n, uint32_t k, const Share& share, uint32_t smem) {
    constexpr uint32_t ROWS = ZS_N / ZS_CLUSTER;
    Stage stage(0);
    Walk at(share, 0);
    for (int32_t left = at.left; left > 0; left--, at.advance(share)) {
#pragma unroll
        for (uint32_t i = 0; i < ZS_KW; i++) {
            const uint32_t full = smem + ZS_BARRIERS + (stage.index * ZS_KW + i) * 16, to = smem + ZS_TILE_SMEM + stage.index * ZS_XBYTES + i * ZS_XBOX;
            const uint32_t column = (at.kstep * ZS_KW + i) * 64;
            mbarrier_wait(full + 8, stage.parity ^ 1);
            mbarrier_arrive_expect_tx(full, ZS_XBOX);
#if ZS_CLUSTER > 1
            tensor_copy_multicast(to + share.rank * (ROWS * 128), x_map, TensorRows{x, ldx, n, k, ROWS}, column, at.token0 + share.rank * ROWS, full, (1 << ZS_CLUSTER) - 1);
#else
            tensor_copy(to, x_map, TensorRows{x, ldx, n, k, ROWS}, column, at.token0, full);
#endif
        }
        stage.advance(1, ZS_XSTAGES);
    }
}

// A unit of activations, whose barriers are at `full`, has been read by this warp: all blocks that write into it have to know.
ZS_DEVICE void release_activations(uint32_t full) {
#pragma unroll
    for (uint32_t i = 0; i < ZS_KW; i++) {
#if ZS_CLUSTER > 1
#pragma unroll
        for (uint32_t r = 0; r < ZS_CLUSTER; r++) mbarrier_arrive_cluster(full + i * 16 + 8, r);
#else
        mbarrier_arrive(full + i * 16 + 8);
#endif
    }
}

// Decodes the units of a warpgroup's strip, one after the other. The words of the next one are under way. Nothing may wait for a load before it is needed, so
// every load has an address, also behind the last tile and below the last strip, where it is that of another tile (a load that may not be there is a choice
// between two registers), and the lanes of a warp load different parts of the headers (what is the same in all lanes goes to the uniform registers at once).
struct Decoder {
    Walk ahead;
    const uint8_t *fixed, *header;  // the sections from what this lane reads of a tile on; of the next unit's first tile
    const uint8_t *a, *b, *h;       // sign-and-mantissa words, bitmaps, part of the header
    bool pair;                      // both tiles of the present unit are there
    LaneWords words[ZS_KW];
    uint32_t headers_part;  // of the two headers: 4 bytes
    uint32_t bits, lane_at, last_strip;
    bool odd;  // the last unit of a strip has one tile

    ZS_DEVICE Decoder(const Blob& blob, const Share& share, uint32_t g, uint32_t w, uint32_t lane) : ahead(share, g) {
        const uint32_t first = w * ZS_SIGN_MANTISSA + lane * 16;
        last_strip = share.strips - 1, odd = share.col_tiles % ZS_KW;
        header = blob.headers + 4 * (lane % (2 * ZS_KW)), fixed = blob.fixed + first, bits = ZS_BITMAPS + w * ZS_WARP_BITMAPS + lane * 4 - first;
        lane_at = lane_offset(w, lane);
        locate(share);
    }
    ZS_DEVICE void locate(const Share& share) {
        const uint64_t tile = min((uint32_t)ahead.strip(), last_strip) * share.col_tiles + ahead.kstep * ZS_KW;
        a = fixed + tile * ZS_FIXED, b = a + bits, h = header + tile * 8;
    }
    ZS_DEVICE void load(LaneWords& to, uint32_t offset) const {
        to.a = ld_stream_v4(a + offset), to.b = ld_stream_v4(a + offset + 512);
        to.p0 = ld_stream_u32(b + offset), to.p1 = ld_stream_u32(b + offset + 128), to.p2 = ld_stream_u32(b + offset + 256);
    }
    // Decodes the present unit to `to`.
    ZS_DEVICE void decode(uint32_t to) const {
        to += lane_at;
#pragma unroll
        for (uint32_t i = 0; i < ZS_KW; i++, to += 8192) {
            const uint32_t base = __shfl_sync(0xFFFFFFFFu, headers_part, 2 * i + 1) >> 16 & 0xFFu;
            if (i == 0 || pair) {
                decode_words(words[i], ZS_HALVES(base << 7), to, to ^ 64);
            } else {  // beyond k: zeros, so that no branch stands around wgmma
                for (uint32_t c = 0; c < 4; c++) st_shared_v4((to ^ 64 * (c & 1)) + 1024 * (c / 2), Vec4{0, 0, 0, 0});
            }
        }
    }
    // Starts the loads of the next unit. Not before the fence behind the decode, which would wait for them.
    ZS_DEVICE void start(const Share& share) {
        pair = !odd || ahead.kstep + 1 < share.ksteps;
        load(words[0], 0), load(words[1], pair ? ZS_FIXED : 0);
        headers_part = ld_stream_u32(h);
        const uint32_t tile = ahead.tile;
        ahead.advance(share);
        a -= ZS_KW * ZS_FIXED, b -= ZS_KW * ZS_FIXED, h -= ZS_KW * 8;
        if (ahead.tile != tile || ahead.left == 1) locate(share);
    }
};

// A warp puts the escapes into the tiles of strip g of every unit. Of the next unit they are under way, of the one after it the headers, as in Decoder.
ZS_DEVICE void patch_tiles(const Blob& blob, const Share& share, uint32_t g, uint32_t lane, uint32_t smem) {
    Walk ahead(share, g);
    const uint8_t *headers = blob.headers + 4 * (lane % (2 * ZS_KW)), *lists = blob.escapes + 4 * lane;
    pin(headers), pin(lists);
    uint32_t part;
    bool pair;
    Escapes escapes[ZS_KW];
    auto look = [&] {
        pair = ahead.kstep * ZS_KW + 1 < share.col_tiles;
        part = ld_stream_u32(headers + (uint64_t)(min(ahead.strip(), share.strips - 1) * share.col_tiles + ahead.kstep * ZS_KW) * 8);
        ahead.advance(share);
    };
    auto start = [&] {
#pragma unroll
        for (uint32_t i = 0; i < ZS_KW; i++) {
            const uint32_t offset = __shfl_sync(0xFFFFFFFFu, part, 2 * i), info = __shfl_sync(0xFFFFFFFFu, part, 2 * i + 1);
            escapes[i].load(lists, i == 0 || pair ? (uint64_t)info << 32 | offset : 0, lane);
        }
        look();
    };
    look();
    start();
    Stage stage(0);
    for (int32_t left = share.units(); left > 0; left--) {
        const uint32_t bar = smem + ZS_DECODED + (stage.index * ZS_GROUPS + g) * 16;
        mbarrier_wait(bar, stage.parity);
#pragma unroll
        for (uint32_t i = 0; i < ZS_KW; i++) escapes[i].patch(blob.escapes, smem + stage.index * ZS_UNIT + (g * ZS_KW + i) * 8192, smem + ZS_SPARE + g * 128, lane);
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) mbarrier_arrive(bar + 8);
        start();
        stage.advance(1, ZS_STAGES);
    }
}

// Warpgroup g decodes its strip of every unit and multiplies it.
ZS_DEVICE void multiply_tiles(const Blob& blob, const Share& share, const Output& out, uint32_t g, uint32_t tid, uint32_t smem, float* workspace) {
    const uint32_t bars = smem + ZS_DECODED + g * 16, units_at = smem + g * (ZS_KW * 8192);
    const bool signals = tid % 32 == 0;
    Stage xstage(0), stage(0);
    Walk at(share, 0);
    Decoder decoder(blob, share, g, tid / 32, tid % 32);
    uint32_t fill = 0;         // stage to decode to
    int32_t ahead = at.left;   // units to decode
    decoder.start(share);
    auto decode = [&] {
        decoder.decode(units_at + fill * ZS_UNIT);
        fence_proxy_async();  // wgmma reads what ordinary stores wrote
        mbarrier_arrive(bars + fill * (ZS_GROUPS * 16));  // every lane: the sanitizer does not know that a warp has met
        fill = fill + 1 == ZS_STAGES ? 0 : fill + 1;
        ahead--;
        decoder.start(share);
    };
    decode();
    if (ahead > 0) decode();
    griddep_wait();
    while (at.left > 0) {
        const int32_t units = at.piece, first = at.kstep;  // counted down
        float acc[ZS_N / 2];
#pragma unroll
        for (uint32_t j = 0; j < ZS_N / 2; j++) acc[j] = 0.0f;
        uint32_t busy = 0;  // barriers of the activations that wgmma may still read
        for (int32_t u = 0; u < units; u++) {
            const uint32_t full = smem + ZS_BARRIERS + xstage.index * (ZS_KW * 16);
            const uint32_t a = wgmma_start(units_at + stage.index * ZS_UNIT), b = wgmma_start(smem + ZS_TILE_SMEM + xstage.index * ZS_XBYTES);
            mbarrier_wait(bars + stage.index * (ZS_GROUPS * 16) + 8, stage.parity);
#pragma unroll
            for (uint32_t i = 0; i < ZS_KW; i++) {
                mbarrier_wait(full + i * 16, xstage.parity);
                wgmma_pin(acc);
                wgmma_fence();
#pragma unroll
                for (uint32_t j = 0; j < 4; j++) wgmma_m64k16_bf16<ZS_N>(acc, wgmma_descriptor(a, i * 8192 + 32 * j), wgmma_descriptor(b, i * ZS_XBOX + 32 * j));
            }
            wgmma_commit();
            wgmma_wait<1>();
            __syncwarp();
            if (signals && busy) release_activations(busy);
            busy = full;
            stage.advance(1, ZS_STAGES);
            xstage.advance(1, ZS_XSTAGES);
            if (ahead > 0) decode();  // where the unit before this one was
        }
        wgmma_wait<0>();
        __syncwarp();
        if (signals) release_activations(busy);
        wgmma_pin(acc);
        settle(acc, out, share, at, first, g, tid, workspace);
        at.advance(share, (uint32_t)units * ZS_PLACES);
    }
}

extern "C" __global__ void __launch_bounds__(ZS_THREADS, 1)
zs_zipgemm_wide(const uint8_t* __restrict__ blob_ptr, const uint16_t* __restrict__ x, uint64_t ldx, const uint16_t* __restrict__ bias, uint16_t* __restrict__ y, uint64_t ldy,
                uint32_t m, uint32_t k, uint32_t n, float* __restrict__ workspace, const __grid_constant__ TensorMap x_map) {
    ZS_SMEM(smem_ptr);
    const uint32_t warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0), smem = smem_addr(smem_ptr);
    const Blob blob(blob_ptr, m, k);
    const Share share(blob, n);
    griddep_launch();
    if (threadIdx.x == 0) {
        for (uint32_t s = 0; s < ZS_XSTAGES * ZS_KW; s++) {
            mbarrier_init(smem + ZS_BARRIERS + s * 16, 1);
            mbarrier_init(smem + ZS_BARRIERS + s * 16 + 8, 4 * ZS_GROUPS * ZS_CLUSTER);
        }
        for (uint32_t s = 0; s < ZS_STAGES * ZS_GROUPS; s++) {
            mbarrier_init(smem + ZS_DECODED + s * 16, 128);
            mbarrier_init(smem + ZS_DECODED + s * 16 + 8, 1);
        }
        fence_mbarrier_init();
    }
    __syncwarp();
#if ZS_CLUSTER > 1
    cluster_arrive_relaxed();
    cluster_wait();
#else
    __syncthreads();
#endif
    if (warp >= ZS_CONSUMERS / 32) {
        setmaxnreg_dec<ZS_LOADER_REGISTERS>();
        const uint32_t helper = warp - ZS_CONSUMERS / 32;
        if (helper > 0) {
            if (helper <= ZS_GROUPS) patch_tiles(blob, share, helper - 1, threadIdx.x % 32, smem);
        } else {
            griddep_wait();
            if (threadIdx.x % 32 == 0) load_activations(x_map, x, ldx, n, k, share, smem);
        }
    } else {
        setmaxnreg_inc<ZS_CONSUMER_REGISTERS>();
        multiply_tiles(blob, share, Output{bias, y, ldy, m, n}, warp / 4, threadIdx.x % 128, smem, workspace);
    }
#if ZS_CLUSTER > 1
    __syncwarp();
    cluster_sync();  // the others may still write here
#endif
}
