// SPDX-License-Identifier: Apache-2.0
// The format of docs/format.md as the kernels see it: layout constants, section addresses, the decode core, the escapes.
#pragma once
#include "ptx.cuh"

// docs/format.md sections 1, 4, 5.
#define ZS_BLOB_HEADER 128
#define ZS_TILE 64u           // rows and columns of a block tile
#define ZS_FIXED 5632u        // bytes of a BF16 tile's fixed part
#define ZS_SIGN_MANTISSA 1024 // bytes of a warp tile's sign-and-mantissa words; they start at 0
#define ZS_BITMAPS 4096       // where the bitmaps start
#define ZS_WARP_BITMAPS 384   // bytes of a warp tile's three bitmaps
#define ZS_FLAG_DENSE 1u

#define ZS_HALVES(x) ((uint32_t)(x) * 0x10001u)  // the same 16 bits in both halves of a word

// Where the sections of a blob are (section 1).
struct Blob {
    const uint8_t* headers;
    const uint8_t* fixed;
    const uint8_t* escapes;
    uint32_t row_tiles, col_tiles;
    ZS_DEVICE Blob(const uint8_t* blob, uint32_t m, uint32_t k, uint32_t fixed_bytes = ZS_FIXED) {
        row_tiles = (m + ZS_TILE - 1) / ZS_TILE;
        col_tiles = (k + ZS_TILE - 1) / ZS_TILE;
        uint64_t tiles = (uint64_t)row_tiles * col_tiles;
        headers = blob + ZS_BLOB_HEADER;
        fixed = headers + ((tiles * 8 + 127) & ~(uint64_t)127);
        escapes = fixed + tiles * fixed_bytes;
        pin(headers), pin(fixed), pin(escapes);
    }
    // Of tiles whose sections the host has found; they may be some of a blob's rows.
    ZS_DEVICE Blob(const uint8_t* headers_, const uint8_t* fixed_, const uint8_t* escapes_, uint32_t m, uint32_t k) : headers(headers_), fixed(fixed_), escapes(escapes_) {
        pin(headers), pin(fixed), pin(escapes);
        row_tiles = (m + ZS_TILE - 1) / ZS_TILE;
        col_tiles = (k + ZS_TILE - 1) / ZS_TILE;
    }
};

// Section 4.
struct TileHeader {
    uint32_t offset, count, base, dense;
    ZS_DEVICE TileHeader() {}
    ZS_DEVICE explicit TileHeader(uint64_t bits) {
        uint32_t hi = (uint32_t)(bits >> 32);
        offset = (uint32_t)bits;
        count = hi & 0xFFFFu;
        base = (hi >> 16) & 0xFFu;
        dense = hi >> 24 & ZS_FLAG_DENSE;
    }
};

// A header of which even lanes have the lower half, odd ones the upper: what all lanes load from one address goes to the uniform registers at once, and the whole latency
// with it.
ZS_DEVICE uint64_t whole_header(uint32_t half) { return (uint64_t)__shfl_sync(0xFFFFFFFFu, half, 1) << 32 | __shfl_sync(0xFFFFFFFFu, half, 0); }

// Decodes the 32 weights of one lane (section 5): s = its eight sign-and-mantissa words, p0..p2 = its three bitmap words,
// base2 = the base exponent at bit 7 of both halves. out[p] is pair p.
//
// Plane k is rotated by k, so three selects with masks bring the bits of one code side by side: at bits b, b+1, b+2 of X[r], with
// r = -b mod 3, stand the three bits of the code of pair b. mad then moves the code to bit 7 and adds it to the base exponent in one
// instruction (code + base never carries out of the exponent: base <= 248). 18 selects and ands less than shifting each code into place.
ZS_DEVICE void decode32(const uint32_t (&s)[8], uint32_t p0, uint32_t p1, uint32_t p2, uint32_t base2, uint32_t (&out)[16]) {
    const uint32_t M1 = ZS_HALVES(0x2492), M2 = ZS_HALVES(0x4924);  // bits 1, 4, 7, .. and 2, 5, 8, .. of a half
    const uint32_t X[3] = {
        select_bits(select_bits(p0, p1, M1), p2, M2),
        select_bits(select_bits(p1, p2, M1), p0, M2),
        select_bits(select_bits(p2, p0, M1), p1, M2),
    };
    const uint32_t Y[3] = {X[0] >> 6, X[1] >> 6, X[2] >> 6};  // pairs 8..13, so that their codes lie below bit 7 too
#pragma unroll
    for (int b = 0; b < 16; b++) {
        const uint32_t sm = b < 8 ? s[b & 7] : byte_perm(s[b & 7], 0, 0x2301);
        const uint32_t t = and_or(sm, ZS_HALVES(0x807F), base2);
        const int r = (3 - b % 3) % 3;
        if (b < 8)
            out[b] = b < 7 ? mad_lo(X[r] & (ZS_HALVES(7) << b), 1u << (7 - b), t) : (X[r] & (ZS_HALVES(7) << 7)) + t;
        else if (b < 14)
            out[b] = b < 13 ? mad_lo(Y[r] & (ZS_HALVES(7) << (b - 6)), 1u << (13 - b), t) : (Y[r] & (ZS_HALVES(7) << 7)) + t;
        else if (b == 14)  // the code's bits wrap around the half: 14, 15 in X[1], 0 in X[2]
            out[b] = and_or(X[2] << 9, ZS_HALVES(0x0200), (X[1] >> 7) & ZS_HALVES(0x0180)) + t;
        else  // 15 in X[0]; 0, 1 in X[1]
            out[b] = and_or(X[1] << 8, ZS_HALVES(0x0300), (X[0] >> 8) & ZS_HALVES(0x0080)) + t;
    }
}

// A decoded tile lies in shared memory as 128-byte rows whose 16-byte chunks are swizzled: chunk c of row r is at c ^ (r mod 8), as
// ldmatrix reads it without conflicts and wgmma reads it in its 128-byte swizzle mode.
ZS_DEVICE uint32_t swizzle_chunk(uint32_t row, uint32_t chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }
// The same for a position (section 6) of a tile: byte offset of weight `row * 64 + column`.
ZS_DEVICE uint32_t swizzle_position(uint32_t pos) { return (pos << 1) ^ ((pos >> 2) & 0x70); }

// Where one lane finds its words of a tile: two pointers, from which everything is at a constant distance.
struct LanePointers {
    const uint8_t *words, *bits;
    ZS_DEVICE LanePointers(const uint8_t* fixed, uint32_t lane) {
        words = fixed + lane * 16, bits = fixed + ZS_BITMAPS + lane * 4;
        pin(words), pin(bits);
    }
};

// The compressed words of one lane of a warp tile.
struct LaneWords {
    Vec4 a, b;            // sign and mantissa
    uint32_t p0, p1, p2;  // bitmaps
    ZS_DEVICE LaneWords() {}
    ZS_DEVICE LaneWords(const LanePointers& from, uint32_t w) {
        const uint8_t *words = from.words + w * ZS_SIGN_MANTISSA, *bits = from.bits + w * ZS_WARP_BITMAPS;
        a = ld_stream_v4(words), b = ld_stream_v4(words + 512);
        p0 = ld_stream_u32(bits), p1 = ld_stream_u32(bits + 128), p2 = ld_stream_u32(bits + 256);
    }
};

// Where a lane of a warp tile w stores its weights in the swizzled tile. FragTile f = 4 i + lane / 8 (section 5): row block i / 2, column block
// 4 (i mod 2) + lane / 8. So chunk 0 is here, chunk 1 at this ^ 64, chunks 2 and 3 are eight rows below.
ZS_DEVICE uint32_t lane_offset(uint32_t w, uint32_t lane) { return swizzle_chunk(w * 16 + (lane & 7), lane >> 3); }

// Decodes a lane's words: chunk 0 to shared address `at`, chunk 1 to `beside`.
ZS_DEVICE void decode_words(const LaneWords& in, uint32_t base2, uint32_t at, uint32_t beside) {
    const uint32_t s[8] = {in.a.x, in.a.y, in.a.z, in.a.w, in.b.x, in.b.y, in.b.z, in.b.w};
    uint32_t d[16];
    decode32(s, in.p0, in.p1, in.p2, base2, d);
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) st_shared_v4((i & 1 ? beside : at) + 1024 * (i / 2), Vec4{d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]});
}

// Decodes a lane's words of warp tile w into the swizzled tile at shared address `tile`.
ZS_DEVICE void decode_lane(const LaneWords& in, uint32_t tile, uint32_t w, uint32_t base2, uint32_t lane) {
    const uint32_t offset = lane_offset(w, lane);
    decode_words(in, base2, tile + offset, tile + (offset ^ 64));
}

// A warp's stream of tiles: the compressed words of the next tile are always under way, in registers. Nothing of it passes through shared memory,
// and no warp waits for another.
struct TileStream {
    LaneWords words[4];
    // Warp tiles begin .. end - 1 of the tile.
    ZS_DEVICE void load(const uint8_t* fixed, uint32_t lane, uint32_t begin = 0, uint32_t end = 4) {
        const LanePointers from(fixed, lane);
#pragma unroll
        for (uint32_t w = 0; w < 4; w++)
            if (w >= begin && w < end) words[w] = LaneWords(from, w);
    }
    // Decodes the tile into shared memory at `tile`; as its registers become free, starts the loads of the tile at `next` (0: none).
    ZS_DEVICE void decode(uint32_t tile, uint32_t base, const uint8_t* next, uint32_t lane) {
        const uint32_t base2 = ZS_HALVES(base << 7);
        const LanePointers from(next, lane);
#pragma unroll
        for (uint32_t w = 0; w < 4; w++) {
            decode_lane(words[w], tile, w, base2, lane);
            if (next) words[w] = LaneWords(from, w);
        }
    }
};

// Puts exponent e into the weight at shared address `at`.
ZS_DEVICE void patch_exponent(uint32_t at, uint32_t e) { st_shared_u16(at, (ld_shared_u16(at) & 0x807Fu) | e << 7); }

// Symbol (entry >> 12, not 15) to exponent (section 6).
ZS_DEVICE uint32_t escape_exponent(uint32_t entry, uint32_t base) {
    const uint32_t symbol = entry >> 12;
    return symbol < 12 ? base - 1 - symbol : base - 4 + symbol;
}

// One entry of a list, whose tile lies at shared address `tile`.
ZS_DEVICE void patch_entry(const uint8_t* list, const TileHeader& head, uint32_t index, uint32_t entry, uint32_t tile) {
    const uint32_t e = entry >> 12 == 15 ? list[2 * head.count + index] : escape_exponent(entry, head.base);
    patch_exponent(tile + swizzle_position(entry & 0xFFFu), e);
}

// All exponents of a dense tile, by one warp.
ZS_DEVICE void patch_dense(const uint8_t* list, uint32_t tile, uint32_t lane) {
    for (uint32_t p = lane * 4; p < 4096; p += 4 * 32) {
        const uint32_t e = ld_stream_u32(list + p);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) patch_exponent(tile + swizzle_position(p + i), e >> 8 * i & 0xFFu);
    }
}

#define ZS_NO_ENTRIES 0xF000F000u  // two entries like those of literals, which patch_words leaves alone

#ifndef ZS_ESCAPE_WORDS
#define ZS_ESCAPE_WORDS 2  // 2, or 4 where there are registers for more
#endif

static_assert(ZS_ESCAPE_WORDS == 2 || ZS_ESCAPE_WORDS == 4, "see Escapes::patch");

// A warp's view of one tile's escapes: the first 64 * ZS_ESCAPE_WORDS entries are loaded ahead, two of a word. (What goes beyond takes a memory latency, and the loads of
// the next tile's words, which the compiler counts with it, are waited for as well.)
struct Escapes {
    uint64_t header;  // of the tile, as it is stored: fewer registers than its fields
    uint32_t words[ZS_ESCAPE_WORDS];

    ZS_DEVICE TileHeader head() const { return TileHeader(header); }

    // lane_escapes: the escape section plus 4 * lane bytes.
    ZS_DEVICE void load(const uint8_t* lane_escapes, uint64_t header_, uint32_t lane) {
        header = header_;
        const TileHeader h(header);
        const uint8_t* list = lane_escapes + (uint64_t)h.offset * 16;
        words[0] = 2 * lane < h.count ? ld_stream_u32(list) : ZS_NO_ENTRIES;
#pragma unroll
        for (uint32_t i = 1; i < ZS_ESCAPE_WORDS; i++) words[i] = 2 * lane + 64 * i < h.count ? ld_stream_u32(list + 128 * i) : ZS_NO_ENTRIES;
    }

    // Gives every escape its exponent in the decoded tile. The warp must have met (__syncwarp) since the decode, and must meet again before the tile
    // is read. `spare`: 128 bytes of shared memory of this warp that nothing else uses.
    ZS_DEVICE void patch(const uint8_t* escapes, uint32_t tile, uint32_t spare, uint32_t lane) const {
        const TileHeader head(header);
        const uint8_t* list = escapes + (uint64_t)head.offset * 16;
        if (head.dense) {
            patch_dense(list, tile, lane);
            return;
        }
        scratch_bytes(spare + 4 * lane, 4);
#if ZS_ESCAPE_WORDS > 2
        uint32_t more[2] = {words[2], words[3]};  // entries 128 .. 255
        patch_words({words[0], words[1]}, head, 0, tile, spare, lane);
#else
        uint32_t more[2] = {ZS_NO_ENTRIES, ZS_NO_ENTRIES};  // the same, under way during the first
        if (head.count > 128) load_more(more, list, head, 128, lane);
        patch_words(words, head, 0, tile, spare, lane);
#endif
        if (head.count > 128) {
            patch_words(more, head, 128, tile, spare, lane);
            for (uint32_t first = 256; first < head.count; first += 128) {
                load_more(more, list, head, first, lane);
                patch_words(more, head, first, tile, spare, lane);
            }
        }
        // Literals come first in a list, so the first entry tells whether there are any.
        if (head.count > 0 && __shfl_sync(0xFFFFFFFFu, words[0] >> 12 & 15u, 0) == 15) patch_literals(list, head, tile, lane);
    }

    // Two words a lane of entries first .. first + 127.
    static ZS_DEVICE void load_more(uint32_t (&to)[2], const uint8_t* list, const TileHeader& head, uint32_t first, uint32_t lane) {
#pragma unroll
        for (uint32_t g = 0; g < 2; g++) to[g] = first + 64 * g + 2 * lane < head.count ? ld_stream_u32(list + 2 * first + 128 * g + 4 * lane) : ZS_NO_ENTRIES;
    }

    // No branch: what is no entry, and literals, go to spare bytes of the lane's own. Loads first, then stores: four latencies become one.
    static ZS_DEVICE void patch_words(const uint32_t (&from)[2], const TileHeader& head, uint32_t first, uint32_t tile, uint32_t spare, uint32_t lane) {
        uint32_t at[4], value[4];
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            // Behind an odd number of entries the other half of their last word is something else.
            const bool odd = first + 64 * (i / 2) + 2 * lane + 1 == head.count;
            const uint32_t entry = i & 1 ? (odd ? ZS_NO_ENTRIES : from[i / 2]) >> 16 : from[i / 2] & 0xFFFFu;
            at[i] = entry < 15u << 12 ? tile + swizzle_position(entry & 0xFFFu) : spare + 4 * lane;
            value[i] = escape_exponent(entry, head.base) << 7;
        }
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) value[i] = and_or(ld_shared_u16(at[i]), 0x807Fu, value[i]);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) st_shared_u16(at[i], value[i]);
    }

    static ZS_DEVICE void patch_literals(const uint8_t* list, const TileHeader& head, uint32_t tile, uint32_t lane) {
        for (uint32_t i = lane;; i += 32) {
            const uint32_t entry = i < head.count ? ((const uint16_t*)list)[i] : 0;
            const bool literal = entry >> 12 == 15;
            if (literal) patch_entry(list, head, i, entry, tile);
            if (!__any_sync(0xFFFFFFFFu, literal)) return;
        }
    }
};
