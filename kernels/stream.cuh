// SPDX-License-Identifier: Apache-2.0
// How a warp streams its tiles from global memory: a private ring of stages in shared memory, refilled by the warp itself as soon as a
// stage has been decoded. No warp waits for another. Copies are bulk copies with mbarriers (ZS_BULK) or cp.async groups.
#pragma once
#include "format.cuh"

// ROWS: rows of the tile that this warp handles (64, or 32/16 for the part `part`). STAGES >= 2.
template <int ROWS, int STAGES>
struct TileRing {
    static constexpr uint32_t PARTS = ZS_TILE / ROWS;
    static constexpr uint32_t BYTES = ZS_FIXED / PARTS;        // of one stage: sign-and-mantissa words, then bitmaps
    static constexpr uint32_t WORDS = 4096 / PARTS, BITS = 1536 / PARTS;
    static constexpr uint32_t SMEM = STAGES * BYTES;           // a multiple of 128

    uint32_t data, bars;  // shared addresses: stages, and one 8-byte mbarrier a stage
    uint32_t lane;
    uint32_t fill_stage, use_stage, use_parity;

    ZS_DEVICE TileRing(uint32_t data_, uint32_t bars_, uint32_t lane_) : data(data_), bars(bars_), lane(lane_), fill_stage(0), use_stage(0), use_parity(0) {
#if ZS_BULK
        if (lane == 0) {
            for (uint32_t s = 0; s < STAGES; s++) mbarrier_init(bars + 8 * s, 1);
            fence_mbarrier_init();
        }
        __syncwarp();
#endif
    }

    // Starts the copy of rows part * ROWS .. of the tile at `tile` (global) into the next stage. The stage must be free: the warp has met since it was read.
    ZS_DEVICE void fill(const uint8_t* tile, uint32_t part) {
        const uint32_t dst = data + fill_stage * BYTES;
#if ZS_BULK
        if (lane == 0) {
            const uint32_t bar = bars + 8 * fill_stage;
            mbarrier_arrive_expect_tx(bar, BYTES);
            if (PARTS == 1) {
                bulk_copy_g2s(dst, tile, BYTES, bar);
            } else {
                bulk_copy_g2s(dst, tile + part * WORDS, WORDS, bar);
                bulk_copy_g2s(dst + WORDS, tile + ZS_BITMAPS + part * BITS, BITS, bar);
            }
        }
#else
        for (uint32_t i = lane * 16; i < WORDS; i += 512) cp_async_16(dst + i, tile + part * WORDS + i);
        for (uint32_t i = lane * 16; i < BITS; i += 512) cp_async_16(dst + WORDS + i, tile + ZS_BITMAPS + part * BITS + i);
        cp_async_commit();
#endif
        fill_stage = fill_stage + 1 == STAGES ? 0 : fill_stage + 1;
    }

    // A fill that copies nothing, so that every wait has its group (cp.async counts groups).
    ZS_DEVICE void fill_none() {
#if !ZS_BULK
        cp_async_commit();
#endif
    }

    // Waits for the oldest stage; returns its shared address. STAGES - 1 younger fills may be under way.
    ZS_DEVICE uint32_t wait() {
#if ZS_BULK
        mbarrier_wait(bars + 8 * use_stage, use_parity);
#else
        cp_async_wait<STAGES - 1>();
        __syncwarp();
#endif
        return data + use_stage * BYTES;
    }

    // The stage has been read by all lanes (the warp has met); it may be filled again.
    ZS_DEVICE void release() {
        use_stage++;
        if (use_stage == STAGES) {
            use_stage = 0;
            use_parity ^= 1;
        }
    }

    // Decodes the stage at shared address `stage` into `out` (swizzled, ROWS rows).
    ZS_DEVICE void decode(uint32_t stage, uint32_t out, uint32_t base) const {
        const uint32_t base2 = ZS_HALVES(base << 7);
#pragma unroll
        for (uint32_t w = 0; w < ROWS / 16; w++) decode_warp_tile(stage, stage + WORDS, out, w, base2, lane);
    }
};
