// SPDX-License-Identifier: Apache-2.0
// gather: rows of a compressed table by their numbers -> 16-bit weights, row-major. nn.Embedding's lookup.
//
// Four lanes of a warp tile hold the 64 weights of one row (docs/format.md section 5): lane row % 8 + 8 j has the column blocks j and j + 4, in the pairs
// 0..7 or, of rows 8..15, in 8..15. So four threads take one row of one tile, a *piece*: 44 bytes each, the tile's header and a share of its escapes.
// Nothing else of the tile is read. A warp has eight pieces, most often of neighbouring tiles.
//
// Launch: block ZS_THREADS, dynamic shared memory ZS_GATHER_SMEM, a block for each ZS_THREADS / 4 pieces; a piece is (token, column of tiles), and there are
// `pieces` = tokens * ceil(k / 64) of them, below 2^32. Limit: few tokens wait for three reads one after the other (number, header, escapes); many for memory, which
// gives 32-byte sectors: 776 bytes for a piece of Gaussian weights (docs/performance.md).
// It may be launched early (programmatic dependent launch); it reads nothing before the kernel ahead of it has ended.
#include "format.cuh"

#ifndef ZS_FP16
#define ZS_FP16 0
#endif
#define ZS_THREADS 128
#define ZS_GATHER_SMEM (ZS_THREADS / 4 * 128)  // a decoded row of 64 for each piece

#if ZS_FP16
#define ZS_GATHER_FIXED 7168u  // section 5.1: three more bitmaps
#define ZS_LOW_BITS 5632u
#define ZS_EXPONENT_AT 10
#define ZS_NO_EXPONENT 0x83FFu
#else
#define ZS_GATHER_FIXED ZS_FIXED
#define ZS_EXPONENT_AT 7
#define ZS_NO_EXPONENT 0x807Fu
#endif

// 16 weights of a row: eight pairs, those of column blocks j and j + 4.
struct Share {
    uint32_t v[8];
};

// decode32 of a lane's words, of which the compiler leaves the half that this row needs. The pairs 8..15 are where the pairs 0..7 are if the bytes of every half change
// places: of the words by their definition, of the bitmaps because 8 bits are half of a rotation.
ZS_DEVICE Share decode_share(const uint32_t (&words)[8], uint32_t p0, uint32_t p1, uint32_t p2, uint32_t base, uint32_t order) {
    uint32_t s[8], d[16];
#pragma unroll
    for (uint32_t q = 0; q < 8; q++) s[q] = byte_perm(words[q], 0, order);
    decode32(s, byte_perm(p0, 0, order), byte_perm(p1, 0, order), byte_perm(p2, 0, order), ZS_HALVES(base << 7), d);
    return Share{{d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]}};
}

// A thread's share of a list: of entries first .. first + 127 those whose index mod 32 is 8 j .. 8 j + 7, where `first` is 8 j more than a multiple of 128.
// They come through L1, for the few of this row are read again.
struct Entries {
    Vec4 v[4];

    ZS_DEVICE void load(const uint8_t* list, uint32_t count, uint32_t first, uint32_t row) {
        const uint32_t none = ZS_HALVES(~row << 6 & 0xFC0u);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) v[i] = first + 32 * i < count ? ld_global_v4(list + 2 * (first + 32 * i)) : Vec4{none, none, none, none};
    }

    // Which of them are of a row of the tile: bits 15 - i and 31 - i are the two entries of word i.
    ZS_DEVICE uint32_t of_row(uint32_t row) const {
        uint32_t found = 0;
#pragma unroll
        for (uint32_t i = 0; i < 16; i++) {
            const Vec4& four = v[i / 4];
            const uint32_t word = i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
            const uint32_t differs = ((word ^ ZS_HALVES(row << 6)) & ZS_HALVES(0x0FC0)) + ZS_HALVES(0x7FFF);  // bit 15 of each half
            found |= (~differs & ZS_HALVES(0x8000)) >> i;
        }
        return found;
    }

    // Gives the weights of a row their exponents; they lie decoded at shared address `decoded`. Each has one entry at most, so the order does not matter.
    ZS_DEVICE void patch(const uint8_t* list, const TileHeader& head, uint32_t first, uint32_t row, uint32_t decoded) const {
        for (uint32_t found = of_row(row); found; found &= found - 1) {
            const uint32_t bit = __ffs(found) - 1, word = 15 - bit % 16, index = first + 32 * (word / 4) + 2 * (word % 4) + bit / 16;
            if (index >= head.count) continue;  // behind the last entry stands something else
            const uint32_t entry = ((const uint16_t*)list)[index];
            const uint32_t e = entry >> 12 == 15 ? list[2 * head.count + index] : escape_exponent(entry, head.base);
            const uint32_t at = decoded + 2 * (entry & 63u);
            st_shared_u16(at, (ld_shared_u16(at) & ZS_NO_EXPONENT) | e << ZS_EXPONENT_AT);
        }
    }
};

// `ids` is not __restrict__: as a promise that nobody writes it, that would let the compiler read it before the kernel ahead has ended.
extern "C" __global__ void __launch_bounds__(ZS_THREADS)
zs_gather(const uint8_t* __restrict__ blob_ptr, const void* ids, uint32_t id_bytes, uint16_t* __restrict__ out, uint32_t m, uint32_t k, uint32_t pieces) {
    ZS_SMEM(smem);
    const uint32_t piece = blockIdx.x * (ZS_THREADS / 4) + threadIdx.x / 4, j = threadIdx.x % 4;
    const uint32_t decoded = smem_addr(smem) + threadIdx.x / 4 * 128;
    const Blob blob(blob_ptr, m, k, ZS_GATHER_FIXED);
    const uint32_t token = piece / blob.col_tiles, tile_column = piece % blob.col_tiles;
    bool mine = piece < pieces;
    griddep_launch();
    griddep_wait();

    uint64_t id = 0;
    if (mine) {
        id = id_bytes == 8 ? ((const uint64_t*)ids)[token] : (uint64_t)(int64_t)((const int32_t*)ids)[token];
        if (id >= m) {
            fail_index();
            mine = false;
        }
    }
    const uint32_t row = (uint32_t)id % ZS_TILE;
    TileHeader head(0);
    const uint8_t* list = blob.escapes;
    Entries entries;
    if (mine) {
        const uint64_t tile = id / ZS_TILE * blob.col_tiles + tile_column;
        const uint64_t header = ld_stream_u64(blob.headers + tile * 8);
        const uint8_t* const fixed = blob.fixed + tile * ZS_GATHER_FIXED;
        const uint32_t lane = row % 8 + 8 * j, warp_tile = row / 16, order = row & 8 ? 0x2301u : 0x3210u;
        const LaneWords in(LanePointers(fixed, lane), warp_tile);
#if ZS_FP16
        const uint8_t* const low = fixed + ZS_LOW_BITS + warp_tile * ZS_WARP_BITMAPS + lane * 4;
        const uint32_t l0 = ld_stream_u32(low), l1 = ld_stream_u32(low + 128), l2 = ld_stream_u32(low + 256);
#endif
        head = TileHeader(header);
        list += (uint64_t)head.offset * 16;
        entries.load(list, head.count, 8 * j, row);
        const uint32_t words[8] = {in.a.x, in.a.y, in.a.z, in.a.w, in.b.x, in.b.y, in.b.z, in.b.w};
        Share share = decode_share(words, in.p0, in.p1, in.p2, head.base, order);
        if (head.dense) {  // base and codes are 0
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                const uint32_t e = ld_stream_u32(list + 64 * row + 8 * j + 32 * (i / 2) + 4 * (i % 2));
                share.v[2 * i] |= byte_perm(e, 0, 0x4140) << 7;
                share.v[2 * i + 1] |= byte_perm(e, 0, 0x4342) << 7;
            }
        }
#if ZS_FP16
        // The code of a weight without sign, mantissa and base is at bit 7; here it is the lower three bits of the mantissa.
        const uint32_t none[8] = {};
        const Share bits = decode_share(none, l0, l1, l2, 0, order);
#pragma unroll
        for (uint32_t i = 0; i < 8; i++)
            share.v[i] = and_or(share.v[i] << 3, ZS_HALVES(0x7FF8), and_or(share.v[i], ZS_HALVES(0x8000), bits.v[i] >> 7));
#endif
        st_shared_v4(decoded + 16 * j, Vec4{share.v[0], share.v[1], share.v[2], share.v[3]});
        st_shared_v4(decoded + 64 + 16 * j, Vec4{share.v[4], share.v[5], share.v[6], share.v[7]});
    }
    __syncwarp();
    for (uint32_t first = 8 * j; first < head.count; first += 128) {
        if (first >= 128) entries.load(list, head.count, first, row);
        entries.patch(list, head, first, row, decoded);
    }
    __syncwarp();
    if (!mine) return;
    uint16_t* const to = out + (uint64_t)token * k;
    const bool aligned = k % 8 == 0 && (uint64_t)out % 16 == 0;
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        const uint32_t at = decoded + 64 * i + 16 * j, column = tile_column * ZS_TILE + 32 * i + 8 * j;
        if (aligned && column < k)
            st_global_v4(to + column, ld_shared_v4(at));
        else
            for (uint32_t c = 0; c < 8 && column + c < k; c++) to[column + c] = (uint16_t)ld_shared_u16(at + 2 * c);
    }
}
