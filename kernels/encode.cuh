// SPDX-License-Identifier: Apache-2.0
// From weights to the words of a lane, and to the list of a tile's escapes (docs/format.md sections 5 and 6).
#pragma once
#include "format.cuh"
#include "simd.cuh"

#define ZS_LIST_STAGE 512u  // positions that a warp collects at a time

// The words of one lane of a warp tile, and where its escapes are: bit 16 h + p is weight 2p + h.
struct Encoded {
    uint32_t words[8], planes[3], escapes;
};

ZS_DEVICE uint32_t rotate_halves(uint32_t x, uint32_t by) { return select_bits(x >> (16 - by), x << by, ZS_EACH(0xFFFFu << by & 0xFFFFu)); }

// The reverse of decode32 (format.cuh): d[p] = pair p as it is in the matrix. The four bits of each code are packed into words, pair 4 i + j in nibble i of
// word j, and then the four words are transposed bit by bit: a plane of the format is what falls out, and a plane of the escapes.
ZS_DEVICE void encode32(const uint32_t* d, uint32_t base2, bool dense, Encoded& out) {
    uint32_t W[4];
#pragma unroll
    for (uint32_t j = 0; j < 4; j++) {
        uint32_t c[4];
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) c[i] = window_codes(d[4 * i + j] & ZS_HALVES(0x7F80), base2);
        W[j] = mad_lo(c[3], 32, mad_lo(c[2], 2, mad_lo(c[1], 16, c[0]) >> 7));
    }
    const uint32_t even = 0x55555555u, low = 0x33333333u;
    const uint32_t a = select_bits(W[1] << 1, W[0], even), b = select_bits(W[1], W[0] >> 1, even);
    const uint32_t c = select_bits(W[3] << 1, W[2], even), e = select_bits(W[3], W[2] >> 1, even);
    const uint32_t keep = dense ? 0 : 0xFFFFFFFFu;
    out.planes[0] = select_bits(c << 2, a, low) & keep;
    out.planes[1] = rotate_halves(select_bits(e << 2, b, low), 1) & keep;
    out.planes[2] = rotate_halves(select_bits(c, a >> 2, low), 2) & keep;
    out.escapes = select_bits(e, b >> 2, low) & keep;
#pragma unroll
    for (uint32_t q = 0; q < 8; q++) out.words[q] = select_bits(byte_perm(d[q + 8], 0, 0x2301), d[q], ZS_HALVES(0x807F));
}

// Encoded.escapes with bit 8 i + j for column j of chunk i: the two halves are interleaved.
ZS_DEVICE uint32_t escapes_by_column(uint32_t x) {
    uint32_t t = (x ^ x >> 8) & 0x0000FF00u;
    x ^= t ^ t << 8, t = (x ^ x >> 4) & 0x00F000F0u;
    x ^= t ^ t << 4, t = (x ^ x >> 2) & 0x0C0C0C0Cu;
    x ^= t ^ t << 2, t = (x ^ x >> 1) & 0x22222222u;
    return x ^ t ^ t << 1;
}

// The exponents of eight weights, a byte each.
ZS_DEVICE uint64_t exponents(const uint32_t* d) {
    const uint32_t lo = byte_perm(d[0] << 1, d[1] << 1, 0x7531), up = byte_perm(d[2] << 1, d[3] << 1, 0x7531);
    return (uint64_t)up << 32 | lo;
}

// Writes one tile's list. masks: a bit for each position; stage: ZS_LIST_STAGE halfwords of shared memory; tile: its weights, as swizzle_chunk places them. count: its escapes,
// not 0; literals: how many of them have no symbol.
ZS_DEVICE void write_list(const uint32_t* masks, uint16_t* stage, const uint8_t* tile, uint32_t base, uint32_t count, uint32_t literals, uint8_t* list, uint32_t lane) {
    // Lane l has positions 128 l .. 128 l + 127.
    const Vec4 mine = ld_shared_v4(smem_addr(masks + 4 * lane));
    uint32_t before = (uint32_t)(__popc(mine.x) + __popc(mine.y) + __popc(mine.z) + __popc(mine.w));
    const uint32_t own = before;
#pragma unroll
    for (uint32_t d = 1; d < 32; d *= 2) {
        const uint32_t up = __shfl_up_sync(0xFFFFFFFFu, before, d);
        if (lane >= d) before += up;
    }
    before -= own;
    uint32_t with = 0, without = literals;  // where the next entry with a literal goes, and the next one without
    for (uint32_t first = 0; first < count; first += ZS_LIST_STAGE) {
        uint32_t m0 = mine.x, m1 = mine.y, m2 = mine.z, m3 = mine.w, position = 128 * lane, rank = before - first;
        for (uint32_t left = own; left;) {
            if (m0 == 0) m0 = m1, m1 = m2, m2 = m3, m3 = 0, position += 32;
            if (m0) {
                if (rank < ZS_LIST_STAGE) stage[rank] = (uint16_t)(position + (uint32_t)__ffs((int)m0) - 1);
                m0 &= m0 - 1, rank++, left--;
            }
        }
        __syncwarp();
        const uint32_t here = min(count - first, ZS_LIST_STAGE);
        for (uint32_t i = lane; i - lane < here; i += 32) {
            const bool is = i < here;
            const uint32_t at = is ? stage[i] : 0, e = is ? *(const uint16_t*)(tile + swizzle_chunk(at / 64, at / 8 % 8) + 2 * (at % 8)) >> 7 & 0xFFu : 0;
            // Symbols exist for -12 .. -1 and 8 .. 10.
            const uint32_t symbol = e < base ? (base - e <= 12 ? base - 1 - e : 15) : min(e - base + 4, 15u);
            uint32_t entry = first + i;
            if (literals) {
                const uint32_t lits = __ballot_sync(0xFFFFFFFFu, is && symbol == 15), others = __ballot_sync(0xFFFFFFFFu, is && symbol != 15), mask = (1u << lane) - 1;
                entry = symbol == 15 ? with + (uint32_t)__popc(lits & mask) : without + (uint32_t)__popc(others & mask);
                with += (uint32_t)__popc(lits), without += (uint32_t)__popc(others);
                if (is && symbol == 15) list[2 * count + entry] = (uint8_t)e;
            }
            if (is) *(uint16_t*)(list + 2 * entry) = (uint16_t)(at | symbol << 12);
        }
        __syncwarp();
    }
    const uint32_t used = 2 * count + literals, pad = (used + 15) / 16 * 16;
    if (used + lane < pad) list[used + lane] = 0;
}

// The list of a dense tile: all its exponents.
ZS_DEVICE void write_dense(const uint8_t* tile, uint8_t* list, uint32_t lane) {
#pragma unroll 4
    for (uint32_t i = lane; i < 512; i += 32) {
        const Vec4 v = ld_shared_v4(smem_addr(tile + swizzle_chunk(i / 8, i % 8)));
        const uint32_t d[4] = {v.x, v.y, v.z, v.w};
        *(uint64_t*)(list + 8 * i) = exponents(d);
    }
}
