// SPDX-License-Identifier: Apache-2.0
// compress: BF16, row-major -> blob, the same bytes as core/codec writes. Three launches, the same `warps` in all of them:
//
//   zs_compress_plan   reads the weights: base exponent and list size of every tile, the checksum. Limit: bytes of the weights / bandwidth.
//   zs_compress_scan   one block: where each warp's lists start; totals for the host, which then knows the size and allocates.
//   zs_compress_write  reads the weights again and writes everything but the blob's header (the host's work). Limit: (raw + compressed) bytes.
//
// Warp w of the grid has the tiles `tiles * w / warps` on: neighbours in memory, and list offsets need no scan over tiles.
//
// Launch: plan and write: block 32 * ZS_WARPS, grid warps / ZS_WARPS, dynamic shared memory ZS_PLAN_SMEM and ZS_WRITE_SMEM; scan: one block of 1024, ZS_SCAN_SMEM.
// scratch: Totals (16 bytes) | two words a warp (list units, checksum), up to a multiple of 16 bytes | 8 bytes a tile (section 4, the
// list's units in place of its offset). It needs no initialisation.
#include "format.cuh"

#ifndef ZS_WARPS
#define ZS_WARPS 8
#endif
#ifndef ZS_BLOCKS
#define ZS_BLOCKS 2  // blocks a multiprocessor
#endif
#define ZS_COLUMNS 8   // copies of a warp's histogram: lanes that would meet in one counter seldom share a copy
#define ZS_PITCH 260u  // words from copy to copy: the same exponent lies in different banks
#define ZS_HISTOGRAM (ZS_COLUMNS * ZS_PITCH * 4)
#define ZS_MASKS 1024  // two masks of 4096 bits: escapes, and those with a literal
#define ZS_PLAN_SMEM (ZS_WARPS * ZS_HISTOGRAM)
#define ZS_WRITE_SMEM (ZS_WARPS * ZS_MASKS)
#define ZS_SCAN_SMEM 256

struct Matrix {
    const uint16_t* src;
    uint64_t ld;
    uint32_t m, k, col_tiles;
    bool aligned;
    ZS_DEVICE Matrix(const uint16_t* src_, uint64_t ld_, uint32_t m_, uint32_t k_) : src(src_), ld(ld_), m(m_), k(k_) {
        col_tiles = (k + ZS_TILE - 1) / ZS_TILE;
        aligned = ld % 8 == 0 && (uint64_t)src % 16 == 0;
    }
    // Eight weights from (row, col) on; where the matrix ends, `fill` in both halves of the words.
    ZS_DEVICE Vec4 load(uint32_t row, uint32_t col, uint32_t fill) const {
        const uint16_t* p = src + row * ld + col;
        if (aligned && row < m && col + 8 <= k) return ld_global_v4(p);
        uint32_t v[4];
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t lo = row < m && col + 2 * i < k ? p[2 * i] : fill & 0xFFFFu, hi = row < m && col + 2 * i + 1 < k ? p[2 * i + 1] : fill & 0xFFFFu;
            v[i] = lo | hi << 16;
        }
        return Vec4{v[0], v[1], v[2], v[3]};
    }
};

// The tiles of one warp, and the parts of the scratch memory.
struct Share {
    uint32_t warp, warps, lane, begin, end;
    uint32_t* sums;   // [warps] list units, [warps] checksums
    uint8_t* tiles;   // 8 bytes each
    ZS_DEVICE Share(const Matrix& x, uint8_t* scratch) {
        warps = gridDim.x * ZS_WARPS, warp = blockIdx.x * ZS_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
        const uint64_t all = (uint64_t)((x.m + ZS_TILE - 1) / ZS_TILE) * x.col_tiles;
        begin = (uint32_t)(all * warp / warps), end = (uint32_t)(all * (warp + 1) / warps);
        sums = (uint32_t*)(scratch + 16);
        tiles = scratch + 16 + ((uint64_t)warps * 8 + 15) / 16 * 16;
    }
};

// Section 7.
ZS_DEVICE uint32_t row_factor(uint32_t x) {
    x ^= x >> 16, x *= 0x7FEB352Du, x ^= x >> 15, x *= 0x846CA68Bu, x ^= x >> 16;
    return x | 1;
}
ZS_DEVICE uint32_t column_factor(uint32_t c) { return (uint32_t)((int32_t)(c * 0x9E3779B1u | 0x10000u) >> 16); }

// Counts and sums eight weights, of which `count` exist.
ZS_DEVICE void tally(const Vec4& v, uint32_t count, uint32_t* histogram, const uint32_t (&factor)[8], uint32_t& sum) {
    const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        if (2 * i < count) atomicAdd(histogram + (word[i] >> 7 & 0xFFu), 1u);
        if (2 * i + 1 < count) atomicAdd(histogram + (word[i] >> 23 & 0xFFu), 1u);
        sum += (uint32_t)((int32_t)(word[i] << 16) >> 16) * factor[2 * i];
        sum += (uint32_t)((int32_t)word[i] >> 16) * factor[2 * i + 1];
    }
}

// From a warp's histogram to the tile's base, escapes and list (sections 3, 4, 6). Leaves the histogram zero.
ZS_DEVICE uint64_t choose(uint32_t* histogram, uint32_t lane) {
    // Lane l adds up exponents l, l + 32, ..; then, in order, exponents 8 l .. 8 l + 7.
    uint32_t h[8];
#pragma unroll
    for (uint32_t i = 0; i < 8; i++) {
        h[i] = 0;
#pragma unroll
        for (uint32_t c = 0; c < ZS_COLUMNS; c++) h[i] += histogram[c * ZS_PITCH + 32 * i + lane];
    }
    __syncwarp();
#pragma unroll
    for (uint32_t i = 0; i < 8; i++) histogram[32 * i + lane] = h[i];
    __syncwarp();
    uint32_t total = 0;
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
    uint32_t base = 255 - (best & 0xFFu);
    const uint32_t all = P[256];
    uint32_t escapes = all - (best >> 8);
    const uint32_t literals = all - (P[min(256u, base + 11)] - P[base < 12 ? 0 : base - 12]);
    __syncwarp();
    for (uint32_t i = lane * 4; i < ZS_COLUMNS * ZS_PITCH; i += 128) st_shared_v4(smem_addr(histogram + i), Vec4{0, 0, 0, 0});
    __syncwarp();
    uint32_t units = (2 * escapes + literals + 15) / 16, flags = 0;
    if (2 * escapes + literals > 4096) base = 0, escapes = 0, units = 256, flags = ZS_FLAG_DENSE;
    return (uint64_t)(flags << 24 | base << 16 | escapes) << 32 | units;
}

extern "C" __global__ void __launch_bounds__(32 * ZS_WARPS, ZS_BLOCKS)
zs_compress_plan(const uint16_t* __restrict__ src, uint64_t ld, uint32_t m, uint32_t k, uint8_t* __restrict__ scratch) {
    ZS_SMEM(smem);
    const Matrix x(src, ld, m, k);
    const Share share(x, scratch);
    const uint32_t lane = share.lane, chunk = lane & 7;
    uint32_t* const histogram = (uint32_t*)(smem + threadIdx.x / 32 * ZS_HISTOGRAM);
    for (uint32_t i = lane * 4; i < ZS_COLUMNS * ZS_PITCH; i += 128) st_shared_v4(smem_addr(histogram + i), Vec4{0, 0, 0, 0});
    __syncwarp();
    uint32_t checksum = 0, units = 0;
    for (uint32_t t = share.begin; t < share.end; t++) {
        const uint32_t row0 = t / x.col_tiles * ZS_TILE + lane / 8, col = t % x.col_tiles * ZS_TILE + chunk * 8;
        const uint32_t columns = col < k ? min(8u, k - col) : 0;
        Vec4 v[16];
#pragma unroll
        for (uint32_t i = 0; i < 16; i++) v[i] = x.load(row0 + 4 * i, col, 0);  // padding has no part in the checksum: it is 0
        uint32_t factor[8];
#pragma unroll
        for (uint32_t j = 0; j < 8; j++) factor[j] = column_factor(col + j);
#pragma unroll
        for (uint32_t i = 0; i < 16; i++) {
            const uint32_t row = row0 + 4 * i;
            uint32_t sum = 0;
            tally(v[i], row < m ? columns : 0, histogram + chunk * ZS_PITCH, factor, sum);
            checksum += row_factor(row) * sum;
        }
        __syncwarp();
        const uint64_t tile = choose(histogram, lane);
        units += (uint32_t)tile;
        if (lane == 0) *(uint64_t*)(share.tiles + (uint64_t)t * 8) = tile;
    }
    checksum = __reduce_add_sync(0xFFFFFFFFu, checksum);
    if (lane == 0) share.sums[share.warp] = units, share.sums[share.warps + share.warp] = checksum;
}

// Adds up over a block of 32 warps; every thread gets the sum over the threads before it, and *total.
ZS_DEVICE uint32_t block_scan(uint32_t v, uint32_t* smem, uint32_t* total) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t sum = v;
#pragma unroll
    for (uint32_t d = 1; d < 32; d *= 2) {
        const uint32_t up = __shfl_up_sync(0xFFFFFFFFu, sum, d);
        if (lane >= d) sum += up;
    }
    if (lane == 31) smem[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        uint32_t s = smem[lane];
#pragma unroll
        for (uint32_t d = 1; d < 32; d *= 2) {
            const uint32_t up = __shfl_up_sync(0xFFFFFFFFu, s, d);
            if (lane >= d) s += up;
        }
        smem[32 + lane] = s;
    }
    __syncthreads();
    const uint32_t before = (warp ? smem[32 + warp - 1] : 0) + sum - v;
    *total = smem[63];
    __syncthreads();
    return before;
}

// totals: u64 list units, u32 checksum, 0. The warps' units become the sums before them.
extern "C" __global__ void __launch_bounds__(1024)
zs_compress_scan(uint32_t warps, uint8_t* __restrict__ scratch) {
    ZS_SMEM(smem);
    uint32_t* const sums = (uint32_t*)(scratch + 16);
    uint32_t carry = 0, checksum = 0;
    for (uint32_t first = 0; first < warps; first += 1024) {
        const uint32_t i = first + threadIdx.x;
        const bool mine = i < warps;
        uint32_t total;
        const uint32_t before = block_scan(mine ? sums[i] : 0, (uint32_t*)smem, &total);
        if (mine) sums[i] = carry + before;
        carry += total;
        block_scan(mine ? sums[warps + i] : 0, (uint32_t*)smem, &total);
        checksum += total;
    }
    if (threadIdx.x == 0) {
        uint32_t* const totals = (uint32_t*)scratch;
        totals[0] = carry, totals[1] = 0, totals[2] = checksum, totals[3] = 0;
    }
}

// The words of one lane of a warp tile, and where its escapes are.
struct Encoded {
    uint32_t words[8], planes[3];
    uint32_t escapes[4], literals[4];  // a bit for each of the eight columns of chunk i
};

// The reverse of decode32 (format.cuh): d[p] = pair p as it is in the matrix.
ZS_DEVICE void encode32(const uint32_t (&d)[16], uint32_t base2, bool dense, Encoded& out) {
    uint32_t X[3] = {0, 0, 0};
#pragma unroll
    for (uint32_t p = 0; p < 16; p++) {
        // Both halves: exponent - base as a 9-bit number, the window is 0 .. 7.
        const uint32_t e = d[p] >> 7 & ZS_HALVES(0xFF);
        uint32_t code = ((e | ZS_HALVES(0x100)) - base2) ^ ZS_HALVES(0x100);
        uint32_t escape = ((code & ZS_HALVES(0x1F8)) + ZS_HALVES(0x7FF8)) >> 15 & ZS_HALVES(1);
        // Symbols exist for -12 .. -1 and 8 .. 10: with 12 added, what is above 22 has none.
        const uint32_t literal = ((((code + ZS_HALVES(12)) & ZS_HALVES(0x1FF)) + ZS_HALVES(0x7FE9)) >> 15 & ZS_HALVES(1)) & escape;
        code &= ZS_HALVES(7) & ~(escape * 7);
        if (dense) code = 0, escape = 0;
        const uint32_t shift = 2 * (p & 3);
        if ((p & 3) == 0) out.escapes[p / 4] = out.literals[p / 4] = 0;
        out.escapes[p / 4] |= ((escape | escape >> 15) & 3) << shift;
        out.literals[p / 4] |= (dense ? 0 : (literal | literal >> 15) & 3) << shift;
        if (p < 14) {
            X[(3 - p % 3) % 3] += code << p;
        } else if (p == 14) {
            X[1] += (code & ZS_HALVES(3)) << 14, X[2] += code >> 2 & ZS_HALVES(1);
        } else {
            X[0] += (code & ZS_HALVES(1)) << 15, X[1] += code >> 1 & ZS_HALVES(3);
        }
    }
    const uint32_t M1 = ZS_HALVES(0x2492), M2 = ZS_HALVES(0x4924);
    out.planes[0] = select_bits(select_bits(X[0], X[2], M1), X[1], M2);
    out.planes[1] = select_bits(select_bits(X[1], X[0], M1), X[2], M2);
    out.planes[2] = select_bits(select_bits(X[2], X[1], M1), X[0], M2);
#pragma unroll
    for (uint32_t q = 0; q < 8; q++)
        out.words[q] = select_bits(byte_perm(d[q + 8], 0, 0x2301), d[q], ZS_HALVES(0x807F));
}

// Writes one tile's list (section 6). masks: 4096 bits of escapes, 4096 of literals, in the order of positions.
ZS_DEVICE void write_list(const uint32_t* masks, const uint16_t* tile, uint64_t ld, uint32_t base, uint32_t count, uint8_t* list, uint32_t lane) {
    uint32_t mine[4], lit[4], n = 0, l = 0;
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        mine[i] = masks[4 * lane + i], lit[i] = masks[128 + 4 * lane + i];
        n += __popc(mine[i]), l += __popc(lit[i]);
    }
    // Sums over the lanes before: escapes low, literals high (at most 4096 each).
    uint32_t sum = n | l << 16;
#pragma unroll
    for (uint32_t d = 1; d < 32; d *= 2) {
        const uint32_t up = __shfl_up_sync(0xFFFFFFFFu, sum, d);
        if (lane >= d) sum += up;
    }
    const uint32_t literals = __shfl_sync(0xFFFFFFFFu, sum, 31) >> 16;
    uint32_t with = (sum >> 16) - l;                       // next entry with a literal
    uint32_t without = literals + (sum & 0xFFFFu) - n - with;  // next entry without one
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        for (uint32_t bits = mine[i]; bits; bits &= bits - 1) {
            const uint32_t bit = (uint32_t)__ffs((int)bits) - 1, position = 128 * lane + 32 * i + bit;
            const uint32_t e = tile[position / 64 * ld + position % 64] >> 7 & 0xFFu;
            const bool literal = lit[i] >> bit & 1;
            const uint32_t symbol = literal ? 15 : e < base ? base - 1 - e : e - base + 4;
            const uint32_t entry = literal ? with : without;
            if (literal) list[2 * count + with++] = (uint8_t)e;
            else without++;
            *(uint16_t*)(list + 2 * entry) = (uint16_t)(position | symbol << 12);
        }
    }
    const uint32_t used = 2 * count + literals, pad = (used + 15) / 16 * 16;
    if (used + lane < pad) list[used + lane] = 0;
}

extern "C" __global__ void __launch_bounds__(32 * ZS_WARPS, ZS_BLOCKS)
zs_compress_write(const uint16_t* __restrict__ src, uint64_t ld, uint32_t m, uint32_t k, const uint8_t* __restrict__ scratch, uint8_t* __restrict__ blob_ptr) {
    ZS_SMEM(smem);
    const Matrix x(src, ld, m, k);
    const Share share(x, (uint8_t*)scratch);
    const Blob blob(blob_ptr, m, k);
    const uint32_t lane = share.lane;
    uint8_t* const masks = smem + threadIdx.x / 32 * ZS_MASKS;
    // The bytes between the tile headers and the fixed parts.
    if (share.warp == 0) {
        uint8_t* const gap = (uint8_t*)blob.headers + (uint64_t)blob.row_tiles * blob.col_tiles * 8;
        for (uint32_t i = lane; gap + i < blob.fixed; i += 32) gap[i] = 0;
    }
    uint32_t offset = share.sums[share.warp];
    for (uint32_t t = share.begin; t < share.end; t++) {
        const uint64_t plan = *(const uint64_t*)(share.tiles + (uint64_t)t * 8);
        const uint32_t units = (uint32_t)plan, hi = (uint32_t)(plan >> 32), count = hi & 0xFFFFu, base = hi >> 16 & 0xFFu;
        const bool dense = hi >> 24 & ZS_FLAG_DENSE;
        if (lane == 0) *(uint64_t*)(blob.headers + (uint64_t)t * 8) = plan & 0xFFFFFFFF00000000ull | offset;
        const uint32_t row0 = t / x.col_tiles * ZS_TILE, col0 = t % x.col_tiles * ZS_TILE;
        uint8_t* const fixed = (uint8_t*)blob.fixed + (uint64_t)t * ZS_FIXED;
        uint8_t* const list = (uint8_t*)blob.escapes + (uint64_t)offset * 16;
        const uint32_t base2 = ZS_HALVES(base), fill = base << 7;
#pragma unroll
        for (uint32_t w = 0; w < 4; w++) {
            uint32_t d[16];
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                const uint32_t row = w * 16 + 8 * (i / 2) + (lane & 7), chunk = 4 * (i & 1) + (lane >> 3);
                const Vec4 v = x.load(row0 + row, col0 + chunk * 8, fill);
                d[4 * i] = v.x, d[4 * i + 1] = v.y, d[4 * i + 2] = v.z, d[4 * i + 3] = v.w;
            }
            Encoded e;
            encode32(d, base2, dense, e);
            uint8_t* const words = fixed + w * ZS_SIGN_MANTISSA + lane * 16;
            st_stream_v4(words, Vec4{e.words[0], e.words[1], e.words[2], e.words[3]});
            st_stream_v4(words + 512, Vec4{e.words[4], e.words[5], e.words[6], e.words[7]});
            uint32_t* const bits = (uint32_t*)(fixed + ZS_BITMAPS + w * ZS_WARP_BITMAPS + lane * 4);
            bits[0] = e.planes[0], bits[32] = e.planes[1], bits[64] = e.planes[2];
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                const uint32_t row = w * 16 + 8 * (i / 2) + (lane & 7), chunk = 4 * (i & 1) + (lane >> 3);
                masks[row * 8 + chunk] = (uint8_t)e.escapes[i];
                masks[512 + row * 8 + chunk] = (uint8_t)e.literals[i];
                if (dense) {
                    uint32_t lo = 0, up = 0;
#pragma unroll
                    for (uint32_t j = 0; j < 2; j++) {
                        lo |= (d[4 * i + j] >> 7 & 0xFFu | (d[4 * i + j] >> 23 & 0xFFu) << 8) << 16 * j;
                        up |= (d[4 * i + 2 + j] >> 7 & 0xFFu | (d[4 * i + 2 + j] >> 23 & 0xFFu) << 8) << 16 * j;
                    }
                    *(uint64_t*)(list + row * 64 + chunk * 8) = (uint64_t)up << 32 | lo;
                }
            }
        }
        __syncwarp();
        if (count) write_list((const uint32_t*)masks, src + row0 * ld + col0, ld, base, count, list, lane);
        __syncwarp();
        offset += units;
    }
}
