// SPDX-License-Identifier: Apache-2.0
// zipgemm on sm_90a for some hundred tokens: y[n, m] = sum_k x[n, k] * w[m, k] (+ bias[m]), w compressed; BF16 in and out, FP32 sums. headers and
// fixed: of the tiles of these m rows, which may be a part of a blob's; escapes: where its section of lists begins.
//
// A block has two strips. The two blocks of a cluster have the same ones, and different tokens: each decodes the tiles of one strip, and copies them into the other's
// shared memory, so that a weight is decoded once for 2 * ZS_N tokens. Where there are not so many a block stands alone and decodes both. Some warps of a block decode,
// columns in turns, and bring the activations by tensor copies; two warpgroups, a strip each, only multiply. turns.cuh says which cluster makes what.
//
// Launch: block ZS_THREADS, clusters of ZS_CLUSTER, grid of whole clusters <= blocks resident at once. Dynamic shared memory ZS_GEMM_SMEM.
// workspace: grid * 2 * 64 * ZS_N floats. Its bytes are 0xFF before the first launch, and every launch leaves them so. x_map: x as n rows of k columns, boxes of
// ZS_XROWS rows of 64 columns, also where n is less, in the 128-byte swizzle; x and ldx must be such that it can be made (multiples of 16 bytes). y: for each
// part_rows of the m rows a matrix of n rows, which ldy says the distance of, one behind the other. y_map: these matrices of part_rows columns, boxes of ZS_N rows of one of
// them, where y and ldy are such that it can be made (Output::by_copies).
//
// With ZS_GATED the first half of the rows of w are gates, m is a multiple of 128, part_rows is m / 2, y is one matrix, n x m / 2, silu(gate) * up, and boxes of y_map are of ZS_N / 2 rows.
#define ZS_WGMMA 1
#define ZS_ESCAPE_WORDS 4

#ifndef ZS_N
#define ZS_N 256  // tokens of a block's output tile, for which there is a wgmma: 16 (alone 32) to 256
#endif
#ifndef ZS_DECODERS
#define ZS_DECODERS 4  // warps that decode: 4, or 8 where the sums leave them registers
#endif
#ifndef ZS_CLUSTER
#define ZS_CLUSTER 2  // blocks that decode for each other, or 1
#endif
#ifndef ZS_XSTAGES
#define ZS_XSTAGES 4  // columns of activations in their ring: 3 or more
#endif
#ifndef ZS_STAGES
#define ZS_STAGES 6  // columns of tiles in theirs: ZS_AT_A_TIME or more. A tile is under way longer than activations are: decoded, by pairs then copied
#endif
#ifndef ZS_GATED
#define ZS_GATED 0  // 1: of a block's strips one has gates, the other what they are for
#endif
#ifndef ZS_PANEL
#define ZS_PANEL 4
#endif
#ifndef ZS_ANYWHERE
#define ZS_ANYWHERE 1
#endif
#ifndef ZS_PART_LEAD
#define ZS_PART_LEAD 2
#endif
#define ZS_ACROSS ZS_CLUSTER
#define ZS_GROUPS 2  // consumer warpgroups, a strip each
#define ZS_MW ZS_GROUPS
#define ZS_KW 1

#define ZS_HANDS (ZS_GROUPS / ZS_CLUSTER)       // decoders of a column, each of a strip
#define ZS_AT_A_TIME (ZS_DECODERS / ZS_HANDS)   // columns that a block's decoders have
#define ZS_CONSUMERS (128 * ZS_GROUPS)          // threads
#define ZS_THREADS (ZS_CONSUMERS + 32 * ZS_DECODERS)
// Registers a thread, of the decoders and of the consumers, which get what is left.
#define ZS_DECODER_REGISTERS (ZS_CLUSTER == 1 ? (ZS_DECODERS > 4 ? 96 : ZS_GATED ? 112 : 120) : (ZS_DECODERS > 4 ? 120 : 104))
#define ZS_LAUNCH_REGISTERS (65536 / ZS_THREADS / 8 * 8)
#define ZS_FREE_REGISTERS ((ZS_LAUNCH_REGISTERS * ZS_THREADS - 32 * ZS_DECODERS * ZS_DECODER_REGISTERS) / ZS_CONSUMERS / 8 * 8)
#define ZS_CONSUMER_REGISTERS (ZS_FREE_REGISTERS > 232 ? 232 : ZS_FREE_REGISTERS)
#define ZS_PIECES_AT_ONCE 8
#define ZS_XBYTES (ZS_N * 128)          // of the activations of a column
#define ZS_XROWS (ZS_N / ZS_HANDS / 2)  // tokens of one copy of them: each of a column's decoders brings two
#define ZS_ABYTES (ZS_GROUPS * 8192)    // of the weights of a column

// Shared memory: the ring of activations | the ring of tiles | barriers, a full and an empty one for each stage: of activations, of tiles | spare bytes of the decoders.
#define ZS_TILE_SMEM (ZS_XSTAGES * ZS_XBYTES)
#define ZS_XBARRIERS (ZS_TILE_SMEM + ZS_STAGES * ZS_ABYTES)
#define ZS_BARRIERS (ZS_XBARRIERS + ZS_XSTAGES * 16)
#define ZS_SPARE (ZS_BARRIERS + ZS_STAGES * 16)
#define ZS_GEMM_SMEM (ZS_SPARE + ZS_DECODERS * 128)

#include "turns.cuh"

// A barrier tells only the last two rounds of its stage apart. Who waits for a stage of tiles has come through the ring ZS_AT_A_TIME columns ago. Who then waits for one of
// activations knows that the column ZS_STAGES back was handed back, and so the stages that were kept for results two columns before that.
static_assert(ZS_AT_A_TIME <= ZS_STAGES && ZS_STAGES + 2 <= 2 * ZS_XSTAGES, "see above");

// The columns of a cluster's turns, from one to another one some way behind it.
struct Columns {
    Turns turn;
    int32_t column;
    bool left;  // there is this one
    ZS_DEVICE Columns(const Plan& plan, uint32_t first) : turn(plan) {
        left = turn.next(plan), column = turn.end - 1;
        advance(plan, first);
    }
    ZS_DEVICE void advance(const Plan& plan, uint32_t columns) {
        column -= (int32_t)columns;
        while (left && column < turn.begin) {
            const int32_t over = turn.begin - 1 - column;
            left = turn.next(plan), column = turn.end - 1 - over;
        }
    }
};

// A column as a decoder sees it.
struct Job {
    uint32_t tile, column, token;  // weight tile of the decoder's strip; first of its columns of x; first token of the block
    // own: the decoder's strip among the block's; below: with gates the tiles above the first one that it may have, or 0.
    ZS_DEVICE Job(const Plan& plan, const Columns& at, uint32_t own, uint32_t below) {
        // Rows below the matrix are those of another strip: no result is made of them.
        const int32_t row = ZS_GATED ? at.turn.strip / 2 : min(at.turn.strip + (int32_t)own, plan.strips - 1);
        tile = (uint32_t)(row * plan.ksteps + at.column) + below;
        column = (uint32_t)at.column * ZS_TILE, token = at.turn.token;
    }
};

// The decoders have strips and columns in turns: a pair's all that of their block, so decoder d has the columns d, d + ZS_DECODERS, .. of the cluster's.
ZS_DEVICE void decode_tiles(const Blob& blob, const TensorMap& x_map, const uint16_t* x, uint64_t ldx, uint32_t n, uint32_t k, const Plan& plan, uint32_t d, uint32_t lane,
                            uint32_t smem) {
    constexpr bool ALONE = ZS_CLUSTER == 1, EARLY = ALONE && ZS_DECODERS <= 4;  // EARLY: so few decoders must not wait for escapes
    const uint32_t spare = smem + ZS_SPARE + d * 128, own = ALONE ? d % ZS_HANDS : plan.rank;
    d /= ZS_HANDS;
    const uint32_t below = ZS_GATED ? own * (uint32_t)(plan.strips / 2 * plan.ksteps) : 0;
    const uint8_t* lane_escapes = blob.escapes + 4 * lane;
    const uint8_t* headers = blob.headers + 4 * (lane & 1);  // halves (whole_header)
    if (!EARLY) pin(lane_escapes);
    pin(headers);
    auto head_of = [&](const Job& c) { return ld_stream_u32(headers + (uint64_t)c.tile * 8); };
    Columns ahead(plan, d);
    if (!ahead.left) {
        cluster_wait();
        return;
    }
    Job at(plan, ahead, own, below);
    uint32_t head = head_of(at);
    TileStream stream;
    auto words_of = [&](const Job& c) { return blob.fixed + (uint64_t)c.tile * ZS_FIXED; };
    stream.load(words_of(at), lane);
    ahead.advance(plan, ZS_AT_A_TIME);
    bool more = ahead.left;
    Job after = more ? Job(plan, ahead, own, below) : at;
    Escapes escapes;
    escapes.load(lane_escapes, whole_header(head), lane);
    head = head_of(after);
    Stage stage(0), xstage(0);
    auto forward = [&](uint32_t columns) {
        stage.parity ^= columns / ZS_STAGES & 1, xstage.parity ^= columns / ZS_XSTAGES & 1;
        stage.advance(columns % ZS_STAGES, ZS_STAGES), xstage.advance(columns % ZS_XSTAGES, ZS_XSTAGES);
    };
    forward(d);
    bool first = true;
    __syncwarp();
    cluster_wait();  // behind the first loads, which take longer
    while (true) {
        if (more) ahead.advance(plan, ZS_AT_A_TIME);
        const bool still = more && ahead.left;
        const Job later = still ? Job(plan, ahead, own, below) : after;
        const uint32_t full = smem + ZS_BARRIERS + stage.index * 16, tile = smem + ZS_TILE_SMEM + stage.index * ZS_ABYTES + own * 8192;
        const uint32_t xfull = smem + ZS_XBARRIERS + xstage.index * 16;
        const uint32_t base2 = ZS_HALVES(escapes.head().base << 7);
        auto bring = [&] {
            if (lane != 0) return;
            mbarrier_arrive_expect_tx(xfull, ZS_XBYTES / ZS_HANDS);
#pragma unroll
            for (uint32_t i = 0; i < 2; i++) {
                const uint32_t row = ((ALONE ? own : 0) * 2 + i) * ZS_XROWS;
                // Tokens behind the last are some others: no result is made of them, and rows of zeros take the copy engine longer.
                const uint32_t token = at.token + row < n ? at.token + row : 0;
                tensor_copy(smem + xstage.index * ZS_XBYTES + row * 128, x_map, TensorRows{x, ldx, n, k, ZS_XROWS}, at.column, token, xfull);
            }
        };
        mbarrier_wait(full + 8, stage.parity ^ 1);
        // Nothing is brought before all lanes have looked: a late one might see the barrier a round further on.
        const bool brought = !first && __shfl_sync(0xFFFFFFFFu, (uint32_t)mbarrier_test(xfull + 8, xstage.parity ^ 1), 0);
        if (brought) bring();
        // Half of the next tile's words are loaded now, the others behind the fence, which waits for all loads that are under way. Where a block stands alone nobody
        // copies the tile, and those who multiply by it have the fence: so all of them begin at once.
        Escapes coming = escapes;
#pragma unroll
        for (uint32_t w = 0; w < 4; w++) {
            decode_lane(stream.words[w], tile, w, base2, lane);
            if (ALONE || w < 2) stream.load(words_of(after), lane, w, w + 1);
        }
        if (EARLY) coming.load(lane_escapes, whole_header(head), lane), head = head_of(later);
        if (lane == 0) prefetch_l2(words_of(later), ZS_FIXED);
        auto bring_now = [&] {
            if (!brought) {
                if (first) griddep_wait();  // weights are there before the kernel ahead has ended, activations only then
                mbarrier_wait(xfull + 8, xstage.parity ^ 1);
                __syncwarp();
                bring();
            }
            first = false;
        };
        if (!ALONE) bring_now();  // while escapes come; a block that stands alone lacks the registers with NVRTC before 12.8
        __syncwarp();
        escapes.patch(blob.escapes, tile, spare, lane);
        if (!ALONE) fence_proxy_async();
        __syncwarp();
        if (ALONE && lane == 0) mbarrier_arrive(full);
        if (!ALONE && lane == 0) {
            bulk_copy_to_block(tile, tile, 8192, full, plan.rank ^ 1);
            mbarrier_arrive_expect_tx(full, 8192);  // the other block's tile
        }
        if (ALONE) bring_now();
        if (!more) return;
        if (!ALONE) stream.load(words_of(after), lane, 2, 4);
        if (!EARLY) coming.load(lane_escapes, whole_header(head), lane);
        escapes = coming, at = after, after = later, more = still;
        if (!EARLY) head = head_of(after);
        forward(ZS_AT_A_TIME);
    }
}

// A warpgroup's results leave by the copy engine, while the tensor cores work on the next tile: a strip's 64 rows by ZS_N tokens take the place of a column of
// activations.
struct Outbox {
    uint32_t sent;  // barriers of the stage that is being read; 0: none
    ZS_DEVICE Outbox() : sent(0) {}
    // The stage may be loaded again once the copy has read it.
    ZS_DEVICE void hand_back(uint32_t tid) {
        if (sent && tid == 0) {
            bulk_copies_read();
            mbarrier_arrive(sent + 8, 4);
        }
        __syncwarp();
        sent = 0;
    }
};

#if ZS_GATED
static_assert(ZS_N % 32 == 0, "see below");
// Makes the results of half of the tokens, the first ones in warpgroup 0: what it lacks for them, and the other one for its own, and then the results go through ZS_XBYTES at
// `at`, from the `full` barrier on, which both have kept. row0: of the gates, row: of the thread's sums. Both call this.
template <uint32_t G>
ZS_DEVICE void settle_gated(const float (&acc)[ZS_N / 2], const Results& out, const uint16_t* bias, const TensorMap& y_map, uint32_t row0, uint32_t row, uint32_t token0, uint32_t tid,
                            uint32_t at, uint32_t full, Outbox& outbox) {
    constexpr uint32_t PIECES = ZS_N / 16, BYTES = ZS_XBYTES / 2;  // of half of the tokens
    const uint32_t both = bias ? (uint32_t)bias[row] | (uint32_t)bias[row + 8] << 16 : 0;  // in one register
    const float b0 = as_float(both << 16), b1 = as_float(both & 0xFFFF0000u);
    auto packed = [&](uint32_t q) {
        const float* const v = acc + 4 * q;
        return Vec4{pack_bf16(v[0] + b0, v[1] + b0), pack_bf16(v[2] + b1, v[3] + b1), pack_bf16(v[4] + b0, v[5] + b0), pack_bf16(v[6] + b1, v[7] + b1)};
    };
    named_barrier_sync(1, ZS_CONSUMERS);  // both have multiplied by what lies there
#pragma unroll
    for (uint32_t q = 0; q < PIECES; q += 2) st_shared_v4(at + tid * 16 + (1 - G) * BYTES + q * 1024, packed((1 - G) * PIECES + q));
    named_barrier_sync(1, ZS_CONSUMERS);
    float results[ZS_N / 4];
#pragma unroll
    for (uint32_t q = 0; q < PIECES; q += 2) {
        const Vec4 own = packed(G * PIECES + q), other = ld_shared_v4(at + tid * 16 + G * BYTES + q * 1024);
        const Vec4 gates = G == 0 ? own : other, ups = G == 0 ? other : own;
        float* const v = results + 4 * q;
        apply_gates(v[0], v[1], gates.x, ups.x), apply_gates(v[2], v[3], gates.y, ups.y);
        apply_gates(v[4], v[5], gates.z, ups.z), apply_gates(v[6], v[7], gates.w, ups.w);
    }
    fence_proxy_async();  // activations are copied there next
    named_barrier_sync(2 + G, 128);
    outbox.sent = full;
    if (out.by_copies()) {
        send_strip(results, out, y_map, row0, token0 + G * (ZS_N / 2), 2 + G, tid, at + G * BYTES);
    } else {
        outbox.hand_back(tid);
        store_strip(results, out, row0, token0 + G * (ZS_N / 2), tid);
    }
}
#endif

// Warpgroup g multiplies its strip of every column.
ZS_DEVICE void multiply_tiles(const Plan& plan, const Results& out, const uint16_t* bias, const TensorMap& y_map, uint32_t g, uint32_t tid, uint32_t smem, float* workspace) {
    const bool signals = tid % 32 == 0;
    Stage stage(0), xstage(0);
    Outbox outbox;
    griddep_wait();
    for (Turns turn(plan); turn.next(plan);) {
        // Whether the results go through the last two stages of this turn: warpgroup 0 keeps the one before the last, warpgroup 1 the last one. With gates they and what
        // they are made of go through the last one, which both keep.
        const bool sends = !ZS_GATED && out.by_copies() && plan.settles(turn.tile) && turn.end - turn.begin >= 2;
        float acc[ZS_N / 2];
#pragma unroll
        for (uint32_t j = 0; j < ZS_N / 2; j++) acc[j] = 0.0f;
        uint32_t busy = 0, xbusy = 0;  // barriers of the stages that wgmma may still read
        auto release = [&](bool keep) {
            __syncwarp();
            if (!signals || !busy) return;
            arrive_everywhere(busy + 8);
            if (!keep) mbarrier_arrive(xbusy + 8);
        };
        for (int32_t column = turn.end - 1; column >= turn.begin; column--) {
            const uint32_t full = smem + ZS_BARRIERS + stage.index * 16, xfull = smem + ZS_XBARRIERS + xstage.index * 16;
            const uint32_t a = wgmma_start(smem + ZS_TILE_SMEM + stage.index * ZS_ABYTES + g * 8192), b = wgmma_start(smem + xstage.index * ZS_XBYTES);
            mbarrier_wait(xfull, xstage.parity);
            mbarrier_wait(full, stage.parity);
            if (ZS_CLUSTER == 1) fence_proxy_async();  // ordinary stores wrote the tile
            wgmma_tile<ZS_N>(acc, a, b);
            outbox.hand_back(tid);
            wgmma_wait<1>();
            release(sends && g == 0 && column == turn.begin);
            busy = full, xbusy = xfull;
            stage.advance(1, ZS_STAGES), xstage.advance(1, ZS_XSTAGES);
        }
        wgmma_wait<0>();
        release(ZS_GATED ? plan.settles(turn.tile) : sends && g == 1);
        wgmma_pin(acc);
        const uint32_t row0 = ZS_GATED ? (uint32_t)turn.strip / 2 * ZS_TILE : ((uint32_t)turn.strip + g) * ZS_TILE;  // of the results
        if (!add_up(acc, plan, turn, g, tid, workspace)) continue;
        auto stage_before = [&](uint32_t back) { return xstage.index < back ? xstage.index + ZS_XSTAGES - back : xstage.index - back; };
#if ZS_GATED
        const uint32_t last = stage_before(1), at = smem + last * ZS_XBYTES, full = smem + ZS_XBARRIERS + last * 16;
        const uint32_t row = row0 + g * out.m + tid / 32 * 16 + tid % 32 / 4;  // of this thread's sums
        if (g == 0) settle_gated<0>(acc, out, bias, y_map, row0, row, turn.token, tid, at, full, outbox);
        else settle_gated<1>(acc, out, bias, y_map, row0, row, turn.token, tid, at, full, outbox);
#else
        if (sends) {
            named_barrier_sync(1, ZS_CONSUMERS);  // the other one has read these stages, too
            const uint32_t kept = stage_before(2 - g);
            send_strip(acc, out, y_map, row0, turn.token, 2 + g, tid, smem + kept * ZS_XBYTES);
            outbox.sent = smem + ZS_XBARRIERS + kept * 16;
        } else {
            store_strip(acc, out, row0, turn.token, tid);
        }
#endif
    }
    if (tid == 0) bulk_copies_read();  // nothing is loaded there again
}

extern "C" __global__ void __launch_bounds__(ZS_THREADS, 1)
zs_zipgemm_pair(const uint8_t* __restrict__ headers, const uint8_t* __restrict__ fixed, const uint8_t* __restrict__ escapes,
                const uint16_t* __restrict__ x, uint64_t ldx, const uint16_t* __restrict__ bias, uint16_t* __restrict__ y, uint64_t ldy,
                uint32_t m, uint32_t part_rows, uint32_t k, uint32_t n, float* __restrict__ workspace, const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap y_map) {
    ZS_SMEM(smem_ptr);
    const uint32_t warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0), smem = smem_addr(smem_ptr);
    griddep_launch();
    if (threadIdx.x == 0) {
        for (uint32_t s = 0; s < ZS_XSTAGES; s++) {
            mbarrier_init(smem + ZS_XBARRIERS + s * 16, ZS_HANDS);
            mbarrier_init(smem + ZS_XBARRIERS + s * 16 + 8, 4 * ZS_GROUPS);
        }
        for (uint32_t s = 0; s < ZS_STAGES; s++) {
            mbarrier_init(smem + ZS_BARRIERS + s * 16, ZS_HANDS);
            mbarrier_init(smem + ZS_BARRIERS + s * 16 + 8, 4 * ZS_GROUPS * ZS_CLUSTER);
        }
        fence_mbarrier_init();
    }
    __syncwarp();
    if (threadIdx.x == 0) prefetch_map(x_map);
    cluster_arrive_relaxed();
    const Blob blob(headers, fixed, escapes, m, k);
    // A plan for each: one for both costs 192 tokens alone a spilled register.
    if (warp < ZS_CONSUMERS / 32) {
        const Plan plan(blob, n);
        cluster_wait();
        setmaxnreg_inc<ZS_CONSUMER_REGISTERS>();
        // Behind gates there is one matrix, and nothing to add.
        multiply_tiles(plan, Results{{ZS_GATED ? nullptr : bias, y, ldy, ZS_GATED ? part_rows : m, n}, part_rows}, bias, y_map, warp / 4, threadIdx.x % 128, smem, workspace);
    } else {
        setmaxnreg_dec<ZS_DECODER_REGISTERS>();
        const Plan plan(blob, n);
        decode_tiles(blob, x_map, x, ldx, n, k, plan, warp - ZS_CONSUMERS / 32, threadIdx.x % 32, smem);
    }
    __syncwarp();
    cluster_sync();  // the other one, if there is one, may still write here
}
