// SPDX-License-Identifier: Apache-2.0
// zipgemm on sm_90a for many tokens: y[n, m] = sum_k x[n, k] * w[m, k] (+ bias[m]), w compressed; BF16 in and out, FP32 sums. headers and fixed:
// of the tiles of these m rows, which may be a part of a blob's; escapes: where its section of lists begins.
//
// Every weight is decoded once, however many tokens there are: a few warps of each block decode tiles in the shadow of the tensor cores and hand them on through
// L2 to all blocks that need them, in the order in which they will be needed. Which warp decodes which tile is not dealt beforehand: each takes the next one, so no
// block waits for another that has not begun. To the multiplying warps it is a product of plain matrices.
//
// turns.cuh says which block makes which output tiles, relay.cuh in what order tiles are decoded.
//
// Launch: block ZS_THREADS, clusters of ZS_CLUSTER, grid of whole clusters <= blocks resident at once, dynamic shared memory ZS_GEMM_SMEM.
// workspace: grid * ZS_GROUPS * 64 * ZS_N floats. flags: ZS_CONTROL words and one for each ZS_GROUPS strips and column of tiles. Of both all bytes are 0xFF before the
// first launch, and every launch leaves them so. decoded: 8192 bytes for each tile, of a multiple of ZS_GROUPS strips, 16-byte aligned. x_map: x as n rows of k columns, boxes of
// ZS_N / ZS_CLUSTER rows of 64 columns, also where n is less, in the 128-byte swizzle. y, part_rows and y_map: as zipgemm_pair's.
#define ZS_WGMMA 1

#ifndef ZS_N
#define ZS_N 256  // tokens of an output tile
#endif
#ifndef ZS_GROUPS
#define ZS_GROUPS 2  // consumer warpgroups, a strip each
#endif
#ifndef ZS_STAGES
#define ZS_STAGES 4  // columns of tiles in the ring
#endif
#ifndef ZS_CLUSTER
#define ZS_CLUSTER 2  // blocks of a cluster: 1, 2
#endif
#define ZS_MW ZS_GROUPS
#define ZS_KW 1
#define ZS_ACROSS 1
#ifndef ZS_PIECES_AT_ONCE
#define ZS_PIECES_AT_ONCE 4
#endif

#define ZS_DECODERS 3  // warps
#define ZS_CONSUMERS (128 * ZS_GROUPS)
#define ZS_THREADS (ZS_CONSUMERS + 128)
// Registers a thread, of the helpers' warpgroup and of the consumers.
#ifndef ZS_HELPER_REGISTERS
#define ZS_HELPER_REGISTERS 120
#endif
#define ZS_LAUNCH_REGISTERS (65536 / ZS_THREADS / 8 * 8)
#define ZS_FREE_REGISTERS ((ZS_LAUNCH_REGISTERS * ZS_THREADS - 128 * ZS_HELPER_REGISTERS) / ZS_CONSUMERS / 8 * 8)
#define ZS_CONSUMER_REGISTERS (ZS_FREE_REGISTERS > 232 ? 232 : ZS_FREE_REGISTERS)
#define ZS_XBOX (ZS_N * 128)             // bytes of the activations of a column
#define ZS_ABYTES (ZS_GROUPS * 8192)     // bytes of the weights of a column
#define ZS_STAGE_BYTES (ZS_XBOX + ZS_ABYTES)

// Shared memory: the ring | a tile for each decoder | barriers: full and empty | spare bytes of the decoders.
#define ZS_DECODED (ZS_STAGES * ZS_STAGE_BYTES)
#define ZS_BARRIERS (ZS_DECODED + ZS_DECODERS * 8192)
#define ZS_SPARE (ZS_BARRIERS + ZS_STAGES * 16)
#define ZS_GEMM_SMEM (ZS_SPARE + ZS_DECODERS * 128)

#include "relay.cuh"

// A warp brings weights and activations of every column.
ZS_DEVICE void load_columns(const TensorMap& x_map, const uint16_t* x, uint64_t ldx, uint32_t n, uint32_t k, const Plan& plan, const uint8_t* decoded, const uint32_t* flags, bool by_copies,
                            uint32_t smem, uint32_t lane) {
    constexpr uint32_t ROWS = ZS_N / ZS_CLUSTER;
    Stage stage(0);
    for (Turns turn(plan); turn.next(plan);) {
        // Rows below the matrix are those of another strip: no result is made of them.
        const int32_t group = min(turn.strip, plan.strips - 1) / ZS_GROUPS;
        const uint32_t here = (uint32_t)min(plan.strips - group * ZS_GROUPS, ZS_GROUPS);
        const uint64_t row = (uint64_t)group * (uint32_t)plan.ksteps;
        const uint32_t own = turn.token + plan.rank * ROWS, token = own < n ? own : 0;  // no zeros (zipgemm_pair)
        int32_t ready = 0;  // columns that are known to be decoded
        for (int32_t column = turn.end - 1; column >= turn.begin; column--, stage.advance(1, ZS_STAGES)) {
            const uint32_t full = smem + ZS_BARRIERS + stage.index * 16, to = smem + stage.index * ZS_STAGE_BYTES;
            if (lane == 0) {
                mbarrier_wait(full + 8, stage.parity ^ 1);
                mbarrier_arrive_expect_tx(full, ZS_STAGE_BYTES);
#if ZS_CLUSTER > 1
                tensor_copy_multicast(to + ZS_ABYTES + plan.rank * (ROWS * 128), x_map, TensorRows{x, ldx, n, k, ROWS}, (uint32_t)column * 64, token, full, (1 << ZS_CLUSTER) - 1);
#else
                tensor_copy(to + ZS_ABYTES, x_map, TensorRows{x, ldx, n, k, ROWS}, (uint32_t)column * 64, token, full);
#endif
            }
            __syncwarp();
            while (ready == 0) {
                const int32_t mine = column - (int32_t)lane;
                const bool done = mine >= turn.begin && ld_acquire_u32(flags + row + mine) + 1 >= here;
                const uint32_t missing = ~__ballot_sync(0xFFFFFFFFu, done);
                ready = missing ? __ffs((int32_t)missing) - 1 : 32;
                if (ready > 0) __syncwarp();  // the vote is no fence: lane 0 copies what the other lanes have acquired
                if (ready > 0 && lane == 0) fence_proxy_async_global();
            }
            ready--;
            if (lane == 0) {
                const uint8_t* const from = decoded + (row + (uint32_t)column) * ZS_ABYTES;
                bulk_copy_g2s(to, from, here * 8192, full);
                for (uint32_t g = here; g < ZS_GROUPS; g++) bulk_copy_g2s(to + g * 8192, from, 8192, full);
            }
        }
        if (!by_copies || !plan.settles(turn.tile)) continue;
        // The results take the place of columns. Who waits for a later column so knows that this round of the stage is over, also that of the other block.
        for (uint32_t g = 0; g < ZS_GROUPS; g++, stage.advance(1, ZS_STAGES)) {
            const uint32_t full = smem + ZS_BARRIERS + stage.index * 16;
            if (lane == 0) mbarrier_wait(full + 8, stage.parity ^ 1), mbarrier_arrive(full);
        }
    }
}

// A warp decodes tile after tile to `decoded`.
ZS_DEVICE void decode_tiles(const Blob& blob, const Plan& plan, uint8_t* decoded, uint32_t* flags, uint32_t* next_ticket, uint32_t tile, uint32_t spare, uint32_t lane, uint32_t guess) {
    const Order order(plan);
    const uint8_t* lane_escapes = blob.escapes + 4 * lane;
    pin(lane_escapes);
    auto prefetch = [&](const Spot& s) {
        if (lane == 0 && s.strip >= 0) prefetch_l2(blob.fixed + s.tile(plan) * ZS_FIXED, ZS_FIXED);
    };
    {  // The first tickets go to the first who ask, but all of them to somebody.
        Spot s{-1, -1};
        if (guess < order.tickets) s = order.locate(guess);
        if (s.column < 0) s.strip = -1;
        prefetch(s);
        if (lane == 0 && s.strip >= 0) prefetch_l2((const uint8_t*)((uint64_t)(blob.headers + s.tile(plan) * 8) & ~15ull), 16);
    }
    griddep_wait();
    const uint32_t limit = 0xFFFFFFF0u - lane;  // 0xFFFFFFFF is the number before the first
    auto claim = [&] { return lane == 0 ? atom_inc_relaxed(next_ticket, limit) : 0; };  // under way: nothing may touch it yet, not even to add the one that is missing
    uint32_t ticket = claim();
    auto next = [&] {  // the tile of the ticket, which is then replaced
        while (true) {
            const uint32_t mine = __shfl_sync(0xFFFFFFFFu, ticket, 0) + 1;
            if (mine >= order.tickets) return Spot{-1, -1};
            const Spot s = order.locate(mine);
            ticket = claim();
            if (s.column >= 0) return s;
        }
    };
    // Half a header (whole_header). Where there is no tile, of any.
    const uint8_t* const headers = blob.headers + 4 * (lane & 1);
    auto head_of = [&](const Spot& s) { return ld_stream_u32(headers + (s.strip < 0 ? 0 : s.tile(plan) * 8)); };
    TileStream stream;
    Escapes escapes;
    Spot at = next();
    if (at.strip < 0) return;
    stream.load(blob.fixed + at.tile(plan) * ZS_FIXED, lane);
    escapes.load(lane_escapes, whole_header(head_of(at)), lane);
    Spot after = next();
    uint32_t head = head_of(after);
    prefetch(after);
    // Flags of tiles that are on their way. One fence in two rounds, behind the next copy: it takes as long as half a tile.
    uint32_t *told = 0, *told_before = 0;
    auto tell = [&] {
        if (lane == 0) {
            fence_release();
            if (told_before) red_add_relaxed(told_before, 1);
            if (told) red_add_relaxed(told, 1);
        }
        told = told_before = 0;
    };
    for (uint32_t round = 0; at.strip >= 0; round++) {
        stream.decode(tile, escapes.head().base, after.strip >= 0 ? blob.fixed + after.tile(plan) * ZS_FIXED : 0, lane);
        __syncwarp();
        escapes.patch(blob.escapes, tile, spare, lane);
        fence_proxy_async();
        __syncwarp();
        const uint64_t column = (uint64_t)(at.strip / ZS_GROUPS) * (uint32_t)plan.ksteps + (uint32_t)at.column;
        if (lane == 0) bulk_copy_s2g(decoded + column * ZS_ABYTES + at.strip % ZS_GROUPS * 8192, tile, 8192);
        if (round & 1) {
            if (lane == 0) bulk_copies_done<1>();
            tell();
        }
        told_before = told, told = flags + column;
        if (round == 0) {  // the first ones are waited for
            if (lane == 0) bulk_copies_done<0>();
            tell();
        }
        at = after;
        if (after.strip >= 0) after = next();
        escapes.load(lane_escapes, whole_header(head), lane);
        head = head_of(after);
        prefetch(after);
        if (lane == 0) bulk_copies_read();
        __syncwarp();
    }
    if (lane == 0) bulk_copies_done<0>();
    tell();
}

// A warpgroup's results leave by the copy engine, while the tensor cores work on the next tile: through the ring, where a strip's 64 rows by ZS_N tokens take
// the place of a column.
struct Outbox {
    uint32_t sent;  // barriers of the stage that is being read; 0: none
    ZS_DEVICE Outbox() : sent(0) {}
    ZS_DEVICE void send(const float (&acc)[ZS_N / 2], const Results& out, const TensorMap& y_map, const Turns& turn, uint32_t g, uint32_t tid, uint32_t smem, const Stage& stage) {
        const uint32_t bars = smem + ZS_BARRIERS + stage.index * 16;
        mbarrier_wait(bars + 8, stage.parity ^ 1);
        send_strip(acc, out, y_map, ((uint32_t)turn.strip + g) * ZS_TILE, turn.token, 1 + g, tid, smem + stage.index * ZS_STAGE_BYTES);
        sent = bars;
    }
    // The stage may be loaded again once the copy has read it. Not before a later column is there, so that the other block has come to this round, too.
    ZS_DEVICE void hand_back(uint32_t tid) {
        if (sent && tid == 0) {
            bulk_copies_read();
            arrive_everywhere(sent + 8, 4 * ZS_GROUPS);
        }
        __syncwarp();
        sent = 0;
    }
};

// Warpgroup g multiplies its strip of every column.
ZS_DEVICE void multiply_columns(const Plan& plan, const Results& out, const TensorMap& y_map, uint32_t g, uint32_t tid, uint32_t smem, float* workspace) {
    const bool signals = tid % 32 == 0;
    Stage stage(0);
    Outbox outbox;
    griddep_wait();
    for (Turns turn(plan); turn.next(plan);) {
        float acc[ZS_N / 2];
#pragma unroll
        for (uint32_t j = 0; j < ZS_N / 2; j++) acc[j] = 0.0f;
        uint32_t busy = 0;  // barriers of the stage that wgmma may still read
        auto release = [&] {
            __syncwarp();
            if (signals && busy) arrive_everywhere(busy + 8);
        };
        for (int32_t column = turn.end; column > turn.begin; column--) {
            const uint32_t full = smem + ZS_BARRIERS + stage.index * 16, at = smem + stage.index * ZS_STAGE_BYTES;
            const uint32_t a = wgmma_start(at + g * 8192), b = wgmma_start(at + ZS_ABYTES);
            mbarrier_wait(full, stage.parity);
            wgmma_tile<ZS_N>(acc, a, b);
            outbox.hand_back(tid);
            wgmma_wait<1>();
            release();
            busy = full;
            stage.advance(1, ZS_STAGES);
        }
        wgmma_wait<0>();
        release();
        wgmma_pin(acc);
        if (!add_up(acc, plan, turn, g, tid, workspace)) continue;
        if (out.by_copies()) {
            stage.advance(g, ZS_STAGES);
            outbox.send(acc, out, y_map, turn, g, tid, smem, stage);
            stage.advance(ZS_GROUPS - g, ZS_STAGES);
        } else {
            store_strip(acc, out, ((uint32_t)turn.strip + g) * ZS_TILE, turn.token, tid);
        }
    }
    if (tid == 0) bulk_copies_read();  // nothing is loaded there again: the other block may not even have come to that round
}

// The last block whose helpers are done, with the tickets and the flags of all, leaves these as they were found; the tensor cores still work on what has been
// loaded. `told`: 4 bytes of shared memory.
ZS_DEVICE void restore_flags(const Blob& blob, uint32_t* flags, uint32_t told, uint32_t tid) {
    __syncwarp();
    named_barrier_sync(7, 128);
    if (tid == 0) st_shared_u32(told, atom_add_acq_rel(flags + 1, 1) + 2);  // blocks that are done
    named_barrier_sync(7, 128);
    if (ld_shared_u32(told) != gridDim.x) return;
    const uint64_t words = ZS_CONTROL + (uint64_t)((blob.row_tiles + ZS_GROUPS - 1) / ZS_GROUPS) * blob.col_tiles;
    for (uint64_t i = tid; i < words; i += 128) flags[i] = 0xFFFFFFFFu;
}

extern "C" __global__ void __launch_bounds__(ZS_THREADS, 1)
zs_zipgemm_relay(const uint8_t* __restrict__ headers, const uint8_t* __restrict__ fixed, const uint8_t* __restrict__ escapes,
                 const uint16_t* __restrict__ x, uint64_t ldx, const uint16_t* __restrict__ bias, uint16_t* __restrict__ y, uint64_t ldy,
                 uint32_t m, uint32_t part_rows, uint32_t k, uint32_t n, float* __restrict__ workspace, uint32_t* flags, uint8_t* decoded, const __grid_constant__ TensorMap x_map,
                 const __grid_constant__ TensorMap y_map) {
    ZS_SMEM(smem_ptr);
    const uint32_t warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0), lane = threadIdx.x % 32, smem = smem_addr(smem_ptr);
    const Blob blob(headers, fixed, escapes, m, k);
    griddep_launch();
    if (threadIdx.x == 0) {
        for (uint32_t s = 0; s < ZS_STAGES; s++) {
            mbarrier_init(smem + ZS_BARRIERS + s * 16, 1);
            mbarrier_init(smem + ZS_BARRIERS + s * 16 + 8, 4 * ZS_GROUPS * ZS_CLUSTER);
        }
        fence_mbarrier_init();
    }
    __syncwarp();
    const Results out{{bias, y, ldy, m, n}, part_rows};
    const uint32_t helper = warp - ZS_CONSUMERS / 32;
    // Nobody's copies or arrivals come before the barriers are there.
#if ZS_CLUSTER > 1
    cluster_arrive_relaxed();
    cluster_wait();
#else
    __syncthreads();
#endif
    if (warp < ZS_CONSUMERS / 32) {
        setmaxnreg_inc<ZS_CONSUMER_REGISTERS>();
        const Plan plan(blob, n);
        multiply_columns(plan, out, y_map, warp / 4, threadIdx.x % 128, smem, workspace);
    } else {
        setmaxnreg_dec<ZS_HELPER_REGISTERS>();
        const Plan plan(blob, n);
        if (helper == 0) {
            if (lane == 0) prefetch_map(x_map);
            if (lane == 0 && out.by_copies()) prefetch_map(y_map);
            griddep_wait();
            load_columns(x_map, x, ldx, n, k, plan, decoded, flags + ZS_CONTROL, out.by_copies(), smem, lane);
        } else {
            decode_tiles(blob, plan, decoded, flags + ZS_CONTROL, flags, smem + ZS_DECODED + (helper - 1) * 8192, smem + ZS_SPARE + (helper - 1) * 128, lane,
                         blockIdx.x * ZS_DECODERS + helper - 1);
        }
        restore_flags(blob, flags, smem + ZS_SPARE, threadIdx.x - ZS_CONSUMERS);
    }
#if ZS_CLUSTER > 1
    __syncwarp();
    cluster_sync();  // the others may still write here
#endif
}
