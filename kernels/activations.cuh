// SPDX-License-Identifier: Apache-2.0
// The mma kernel's walk through its work, and how activations come into its shared memory.
#pragma once
#include "mma.cuh"

// A walk through units from the end to the beginning, with the tile of one consumer.
struct Cursor {
    int32_t left, kstep, strip, ktile;  // units left; column step; row of tiles of this consumer; its column of tiles
    const uint8_t *fixed, *header;      // of its tile
    ZS_DEVICE Cursor(const Work& w, const Blob& b, uint32_t mw, uint32_t kw) {
        left = w.end - w.begin;
        const int32_t group = (w.end - 1) / w.ksteps;
        kstep = (w.end - 1) - group * w.ksteps;
        strip = group * ZS_MW + (int32_t)mw;
        ktile = kstep * ZS_KW + (int32_t)kw;
        locate(w, b);
    }
    ZS_DEVICE void locate(const Work& w, const Blob& b) {
        const uint32_t tile = (uint32_t)(strip * w.col_tiles + ktile);
        fixed = b.fixed + (uint64_t)tile * ZS_FIXED, header = b.headers + (uint64_t)tile * 8;
    }
    ZS_DEVICE void advance(const Work& w, const Blob& b) {
        left--;
        if (kstep > 0) {
            kstep--;
            ktile -= ZS_KW;
            fixed -= ZS_KW * ZS_FIXED, header -= ZS_KW * 8;
        } else {
            kstep = w.ksteps - 1;
            ktile += kstep * ZS_KW;
            strip -= ZS_MW;
            locate(w, b);
        }
    }
    ZS_DEVICE bool exists(const Work& w) const { return left > 0 && ktile < w.col_tiles && strip < w.strips; }
};

// The activations of the warps (.., kw), tile by tile, each token a row of 64 columns. The ZS_MW warps copy together, ZS_XSTAGES - 1 tiles
// ahead, and all read.
struct Activations {
    const uint8_t* src;           // this thread's chunk of 16 bytes of the next tile to copy
    uint64_t ldx;                 // bytes between tokens
    uint32_t n, k, tid, row0;     // tokens, columns; lane; its first row
    uint32_t data, bars;          // shared addresses: stages; a full and an empty barrier a stage
    uint32_t use_stage, use_parity;
    uint32_t fill_stage, fill_parity, fill_to;
    int32_t left, ktile, ksteps;  // tiles still to copy; the next one's column
    int32_t whole;                // columns of tiles that can be copied in 16-byte pieces

    // xs: all stages; barriers: 16 bytes a stage and kw.
    ZS_DEVICE Activations(const uint16_t* x, uint64_t ldx_, uint32_t n_, uint32_t k_, uint32_t xs, uint32_t barriers, uint32_t mw, uint32_t kw, uint32_t tid_) {
        ldx = ldx_ * 2, n = n_, k = k_, tid = tid_, row0 = (mw * 32 + tid) / 8;
        src = (const uint8_t*)x + row0 * ldx + tid % 8 * 16;
        pin(src);
        data = xs + kw * (ZS_XSTAGES * ZS_XBYTES), bars = barriers + kw * (16 * ZS_XSTAGES);
        fill_to = data + row0 * ZS_XROW + tid % 8 * 16;
        use_stage = use_parity = fill_stage = 0, fill_parity = 1;  // a fresh barrier's previous phase counts as complete
        whole = ldx % 16 == 0 && (uint64_t)x % 16 == 0 ? (int32_t)(k / 64) : 0;
    }
    // Barriers, and zeros for the tokens n .. ZS_N - 1. The block must meet afterwards.
    ZS_DEVICE void init(uint32_t mw) const {
        if (mw != 0) return;
        if (tid == 0) {
            for (uint32_t s = 0; s < ZS_XSTAGES; s++) {
                mbarrier_init(bars + 16 * s, 32 * ZS_MW);
                mbarrier_init(bars + 16 * s + 8, ZS_MW);
            }
        }
        for (uint32_t i = tid * 16; i < ZS_XSTAGES * ZS_XBYTES; i += 32 * 16) st_shared_v4(data + i, Vec4{0, 0, 0, 0});
    }
    // Starts the copies of the first stages.
    ZS_DEVICE void start(const Cursor& at, const Work& work) {
        left = at.left, ktile = at.ktile, ksteps = work.ksteps;
        src += (int64_t)ktile * 128;
        for (uint32_t s = 0; s + 1 < ZS_XSTAGES; s++) fill();
    }
    // Starts the next copy.
    ZS_DEVICE void fill() {
        if (left <= 0) return;
        const uint32_t full = bars + 16 * fill_stage;
        uint32_t dst = fill_to + fill_stage * ZS_XBYTES;
        mbarrier_wait(full + 8, fill_parity);
        if (ktile < whole) {
            const uint8_t* from = src;
#pragma unroll
            for (uint32_t i = 0; i < (ZS_N + ZS_XROWS - 1) / ZS_XROWS; i++) {
                if (row0 + i * ZS_XROWS < n) cp_async_16(dst, from);
                dst += ZS_XROWS * ZS_XROW, from += ZS_XROWS * ldx;
            }
            cp_async_mbarrier_arrive(full);
        } else {
            fill_slowly(dst);
            mbarrier_arrive(full);
        }
        if (++fill_stage == ZS_XSTAGES) fill_stage = 0, fill_parity ^= 1;
        left--;
        ktile -= ZS_KW, src -= ZS_KW * 128;
        if (ktile < 0) ktile += ksteps * ZS_KW, src += (int64_t)ksteps * (ZS_KW * 128);
    }
    // Unaligned rows, and the end of k.
    ZS_DEVICE void fill_slowly(uint32_t dst) const {
        const uint8_t* from = src;
#pragma unroll 1
        for (uint32_t row = row0; row < n; row += ZS_XROWS, dst += ZS_XROWS * ZS_XROW, from += ZS_XROWS * ldx)
            st_shared_v4(dst, load_x((const uint16_t*)from, (uint32_t)ktile * 64 + tid % 8 * 8, k));
    }
    // Waits for the present tile's rows.
    ZS_DEVICE uint32_t wait() const {
        mbarrier_wait(bars + 16 * use_stage, use_parity);
        return data + use_stage * ZS_XBYTES;
    }
    // On to the next tile; returns the barrier on which one lane of each warp has to arrive when the warp is through with this one.
    ZS_DEVICE uint32_t next() {
        const uint32_t empty = bars + 16 * use_stage + 8;
        if (++use_stage == ZS_XSTAGES) use_stage = 0, use_parity ^= 1;
        return empty;
    }
};
