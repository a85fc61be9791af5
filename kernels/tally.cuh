// SPDX-License-Identifier: Apache-2.0
// Which window a tile gets (docs/format.md section 3), and what that costs in escapes. A tile is 64 words of two weights in each lane of a warp.
#pragma once
#include "format.cuh"
#include "simd.cuh"

#define ZS_COUNTERS 257  // of a warp: what choose_by_histogram needs

// The plan of a tile: list units and literals, then the upper half of its header (section 4).
ZS_DEVICE uint64_t tile_plan(uint32_t base, uint32_t escapes, uint32_t literals) {
    uint32_t units = (2 * escapes + literals + 15) / 16, flags = 0;
    if (2 * escapes + literals > 4096) base = 0, escapes = 0, literals = 0, units = 256, flags = ZS_FLAG_DENSE;
    return (uint64_t)(flags << 24 | base << 16 | escapes) << 32 | (literals << 16 | units);
}
ZS_DEVICE uint32_t plan_units(uint64_t plan) { return (uint32_t)plan & 0xFFFFu; }

// Weights with an exponent of at least e, 88 .. 247, counted two at a time as FP16: the bits of a BF16 number without its sign, read as FP16, are a
// number of the same order. With u the distance of two such numbers below the one where exponent e begins, x / u - (begin / u - 1), cut to 0 .. 1, is 1
// from there on and 0 below; all of that is exact. No weight may be above 247: it would be infinity or NaN.
struct Threshold {
    uint32_t scale, shift;
    ZS_DEVICE explicit Threshold(uint32_t e) {
        const uint32_t top = e >> 3, rest = e & 7;
        scale = ZS_EACH((rest ? 40 - top : 41 - top) << 10);
        shift = ZS_EACH(0x8000 | (rest ? 0x63FF + 128 * rest : 0x67FF));
    }
};
#define ZS_COUNT_ZERO ZS_EACH(0x6400)  // 1024 in FP16, whose last bit is worth 1
ZS_DEVICE uint32_t count_value(uint32_t count) { return (count & 0x3FFu) + (count >> 16 & 0x3FFu); }

// Over the warp: weights with an exponent of at least a, and of at least b.
ZS_DEVICE void count_above(const uint32_t (&w)[64], uint32_t a, uint32_t b, uint32_t& above_a, uint32_t& above_b) {
    const Threshold ta(a), tb(b);
    uint32_t ca = ZS_COUNT_ZERO, cb = ZS_COUNT_ZERO;
#pragma unroll
    for (uint32_t i = 0; i < 64; i++) {
        const uint32_t v = abs_halves(w[i]);
        ca = count_steps(ca, v, ta.scale, ta.shift), cb = count_steps(cb, v, tb.scale, tb.shift);
    }
    const uint32_t both = __reduce_add_sync(0xFFFFFFFFu, count_value(ca) | count_value(cb) << 16);
    above_a = both & 0xFFFFu, above_b = both >> 16;
}

// w: the weights, padding 0; `most` and `least`: the largest and the smallest of them without signs over the warp; all: how many weights there are.
// Returns false where the exponents are outside of what thresholds can count.
//
// With E the largest exponent, no window beats the one that ends at E but one that ends lower, at E - s; that one misses all weights above E - s.
// So the search goes down from E and ends when these alone are more than the best window misses. (Equal windows: the smallest base.)
ZS_DEVICE bool choose_by_thresholds(const uint32_t (&w)[64], uint32_t most, uint32_t least, uint32_t all, uint64_t& plan) {
    const uint32_t E = most >> 7;
    if (E < 112 || E > 247) return false;
    uint32_t top, next, count, lower;  // weights from E, E - 1, E - 7, E - 8 on
    {
        const Threshold t0(E), t1(E - 1), t7(E - 7), t8(E - 8);
        uint32_t c0 = ZS_COUNT_ZERO, c1 = c0, c7 = c0, c8 = c0;
#pragma unroll
        for (uint32_t i = 0; i < 64; i++) {
            const uint32_t v = abs_halves(w[i]);
            c0 = count_steps(c0, v, t0.scale, t0.shift), c1 = count_steps(c1, v, t1.scale, t1.shift);
            c7 = count_steps(c7, v, t7.scale, t7.shift), c8 = count_steps(c8, v, t8.scale, t8.shift);
        }
        const uint32_t a = __reduce_add_sync(0xFFFFFFFFu, count_value(c0) | count_value(c1) << 16);
        const uint32_t b = __reduce_add_sync(0xFFFFFFFFu, count_value(c7) | count_value(c8) << 16);
        top = a & 0xFFFFu, next = a >> 16, count = b & 0xFFFFu, lower = b >> 16;
    }
    uint32_t base = E - 7, missed = all - count, above = next;
    if (all - (lower - top) <= missed) base = E - 8, missed = all - (lower - top);
    for (uint32_t s = 2; above <= missed; s++) {  // above: weights above E - s
        if (E - 7 - s < 88) return false;
        uint32_t window, from;
        count_above(w, E - 7 - s, E - s, window, from);
        if (all - (window - above) <= missed) base = E - 7 - s, missed = all - (window - above);
        above = from;
    }
    uint32_t literals = 0;
    if (least >> 7 < base - 12 || E > base + 10) {
        if (base - 12 < 88) return false;
        uint32_t within, beyond;
        count_above(w, base - 12, min(base + 11, 247u), within, beyond);
        literals = all - within + (E > base + 10 ? beyond : 0);
    }
    plan = tile_plan(base, missed, literals);
    return true;
}

// The same for any exponents, from how often each occurs: 256 counters in shared memory, which are destroyed, and one word behind them.
ZS_DEVICE uint64_t choose_by_histogram(uint32_t* histogram, uint32_t lane) {
    uint32_t h[8], total = 0;
    __syncwarp();
#pragma unroll
    for (uint32_t i = 0; i < 8; i++) h[i] = total += histogram[8 * lane + i];
    uint32_t before = total;
#pragma unroll
    for (uint32_t d = 1; d < 32; d *= 2) {
        const uint32_t up = __shfl_up_sync(0xFFFFFFFFu, before, d);
        if (lane >= d) before += up;
    }
    before -= total;
    // P[e] = weights with an exponent below e.
    __syncwarp();
    uint32_t* const P = histogram;
    if (lane == 0) P[0] = 0;
#pragma unroll
    for (uint32_t i = 0; i < 8; i++) P[8 * lane + i + 1] = before + h[i];
    __syncwarp();
    // The largest window, of equal ones the smallest base.
    uint32_t best = 0;
#pragma unroll
    for (uint32_t i = 0; i < 8; i++) {
        const uint32_t b = 32 * i + lane;
        if (b <= 248) best = max(best, (P[b + 8] - P[b]) << 8 | (255 - b));
    }
    best = __reduce_max_sync(0xFFFFFFFFu, best);
    const uint32_t base = 255 - (best & 0xFFu), all = P[256];
    const uint32_t literals = all - (P[min(256u, base + 11)] - P[base < 12 ? 0 : base - 12]);
    __syncwarp();
    return tile_plan(base, all - (best >> 8), literals);
}
