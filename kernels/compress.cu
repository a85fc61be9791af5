// SPDX-License-Identifier: Apache-2.0
// compress: BF16, row-major -> blob, the same bytes as core/codec writes. Three launches, the same blocks in the first and the last:
//
//   zs_compress_plan   reads the weights: base exponent and list size of every tile, the checksum. Limit: bytes of the weights / bandwidth.
//   zs_compress_scan   one block: where each block's lists start; totals for the host, which then knows the size and allocates.
//   zs_compress_write  reads the weights again and writes the blob, whose header (section 2) comes from the host. Limit: (raw + compressed) bytes / bandwidth.
//
// Block b has the tiles `tiles * b / blocks` on, its warps take them in turn: neighbouring tiles are read and written at about the same time. The writers
// go backwards, from what the last readers have left in L2: block 0 of their grid is the last one here.
//
// Launch: plan and write: block 32 * ZS_WARPS, dynamic shared memory ZS_PLAN_SMEM and ZS_WRITE_SMEM; scan: one block of 1024, ZS_SCAN_SMEM.
// scratch: Totals (16 bytes) | two words a block (list units, checksum), up to a multiple of 16 bytes | 8 bytes a tile (tally.cuh, tile_plan). It
// needs no initialisation.
#include "encode.cuh"
#include "tally.cuh"

#ifndef ZS_WARPS
#define ZS_WARPS 4
#endif
#ifndef ZS_BLOCKS
#define ZS_BLOCKS 4  // blocks a multiprocessor
#endif
#define ZS_PLAN_WARP (256 + (ZS_COUNTERS * 4 + 12) / 16 * 16)  // factors of 64 rows, counters
#define ZS_PLAN_SMEM (ZS_WARPS * (ZS_PLAN_WARP + 16))
#define ZS_WRITE_WARP (4096 + 512 + 2 * ZS_LIST_STAGE)  // the tile's exponents, a bit for each of its positions, positions of escapes
#define ZS_WRITE_SMEM (ZS_WARPS * ZS_WRITE_WARP)
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
    ZS_DEVICE bool whole(uint32_t row0, uint32_t col0) const { return aligned && row0 + ZS_TILE <= m && col0 + ZS_TILE <= k; }
    ZS_DEVICE uint32_t count(uint32_t row0, uint32_t col0) const { return min(ZS_TILE, m - row0) * min(ZS_TILE, k - col0); }
    // Eight weights from (row, col) on, of a tile that is not whole; where the matrix ends, `fill`.
    ZS_DEVICE Vec4 load(uint32_t row, uint32_t col, uint32_t fill) const {
        const uint16_t* p = src + row * ld + col;
        uint32_t v[4];
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t lo = row < m && col + 2 * i < k ? p[2 * i] : fill, hi = row < m && col + 2 * i + 1 < k ? p[2 * i + 1] : fill;
            v[i] = lo | hi << 16;
        }
        return Vec4{v[0], v[1], v[2], v[3]};
    }
};

// The tiles of one block, and the parts of the scratch memory.
struct Share {
    uint32_t block, warp, lane, begin, end;
    uint32_t* sums;   // [blocks] list units, [blocks] checksums
    uint64_t* plans;  // of the tiles
    ZS_DEVICE Share(const Matrix& x, uint8_t* scratch, uint32_t block_) : block(block_) {
        warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const uint64_t all = (uint64_t)((x.m + ZS_TILE - 1) / ZS_TILE) * x.col_tiles;
        begin = (uint32_t)(all * block / gridDim.x), end = (uint32_t)(all * (block + 1) / gridDim.x);
        sums = (uint32_t*)(scratch + 16);
        plans = (uint64_t*)(scratch + 16 + ((uint64_t)gridDim.x * 8 + 15) / 16 * 16);
    }
};

// Section 7.
ZS_DEVICE uint32_t row_factor(uint32_t x) {
    x ^= x >> 16, x *= 0x7FEB352Du, x ^= x >> 15, x *= 0x846CA68Bu, x ^= x >> 16;
    return x | 1;
}
// The factors of two columns as bytes: lower halves, upper halves.
ZS_DEVICE uint32_t column_factors(uint32_t c) { return byte_perm(c * 0x9E3779B1u | 0x10000u, (c + 1) * 0x9E3779B1u | 0x10000u, 0x7362); }

// How often each exponent occurs among the weights of a tile, read once more.
ZS_DEVICE void count_exponents(const Matrix& x, uint32_t row0, uint32_t col0, uint32_t* histogram, uint32_t lane) {
    for (uint32_t i = lane; i < 256; i += 32) histogram[i] = 0;
    __syncwarp();
    const uint32_t columns = min(ZS_TILE, x.k - col0), all = x.count(row0, col0);
    for (uint32_t i = lane; i < all; i += 32) {
        const uint32_t row = i / columns, col = i % columns;
        atomicAdd(histogram + (x.src[(row0 + row) * x.ld + col0 + col] >> 7 & 0xFFu), 1u);
    }
}

extern "C" __global__ void __launch_bounds__(32 * ZS_WARPS, ZS_BLOCKS)
zs_compress_plan(const uint16_t* __restrict__ src, uint64_t ld, uint32_t m, uint32_t k, uint8_t* __restrict__ scratch) {
    ZS_SMEM(smem);
    const Matrix x(src, ld, m, k);
    const Share share(x, scratch, blockIdx.x);
    const uint32_t lane = share.lane, chunk = lane & 7;
    uint32_t* const factors = (uint32_t*)(smem + share.warp * ZS_PLAN_WARP);  // of row 4 i + j at 16 j + i
    uint32_t* const histogram = factors + 64;
    uint32_t units = 0, low = 0, high = 0, factors_of = 0xFFFFFFFFu;
    for (uint32_t t = share.begin + share.warp; t < share.end; t += ZS_WARPS) {
        const uint32_t row0 = t / x.col_tiles * ZS_TILE, col0 = t % x.col_tiles * ZS_TILE, col = col0 + chunk * 8;
        uint32_t w[64];
        if (x.whole(row0, col0)) {
            const uint16_t* const p = src + (row0 + lane / 8) * ld + col;
#pragma unroll
            for (uint32_t i = 0; i < 16; i++) {
                const Vec4 v = ld_global_v4(p + 4 * i * ld);
                w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
            }
        } else {
#pragma unroll
            for (uint32_t i = 0; i < 16; i++) {
                const Vec4 v = x.load(row0 + lane / 8 + 4 * i, col, 0);  // padding is 0: it counts nowhere
                w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
            }
        }
        if (row0 != factors_of) {
            __syncwarp();
#pragma unroll
            for (uint32_t r = lane; r < 64; r += 32) factors[16 * (r & 3) + r / 4] = row_factor(row0 + r);
            __syncwarp();
            factors_of = row0;
        }
        uint32_t Q[4], most = 0, least = ZS_EACH(0x7C00);
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) Q[j] = column_factors(col + 2 * j);
#pragma unroll
        for (uint32_t i = 0; i < 16; i += 4) {
            const Vec4 A = ld_shared_v4(smem_addr(factors + 16 * (lane / 8) + i));
            const uint32_t a[4] = {A.x, A.y, A.z, A.w};
#pragma unroll
            for (uint32_t r = 0; r < 4; r++) {
                int32_t l = 0, h = 0;
#pragma unroll
                for (uint32_t j = 0; j < 4; j++) {
                    uint32_t& v = w[4 * (i + r) + j];
                    l = dot_low(v, Q[j], l), h = dot_high(v, Q[j], h);
                    v &= ZS_EACH(0x7FFF);
                    most = max_halves(most, v), least = min_halves(least, v);
                }
                low += (uint32_t)l * a[r], high += (uint32_t)h * a[r];
            }
        }
        most = __reduce_max_sync(0xFFFFFFFFu, max(most & 0xFFFFu, most >> 16)), least = __reduce_min_sync(0xFFFFFFFFu, min(least & 0xFFFFu, least >> 16));
        uint64_t plan;
        if (!choose_by_thresholds(w, most, least, x.count(row0, col0), plan)) {
            count_exponents(x, row0, col0, histogram, lane);
            plan = choose_by_histogram(histogram, lane);
        }
        units += plan_units(plan);
        if (lane == 0) share.plans[t] = plan;
    }
    griddep_launch();  // zs_compress_scan may start to start
    const uint32_t checksum = __reduce_add_sync(0xFFFFFFFFu, low + (high << 8));
    uint32_t* const sums = (uint32_t*)(smem + ZS_WARPS * ZS_PLAN_WARP);
    if (lane == 0) sums[2 * share.warp] = units, sums[2 * share.warp + 1] = checksum;
    __syncthreads();
    if (threadIdx.x < 2) {
        uint32_t sum = 0;
        for (uint32_t i = 0; i < ZS_WARPS; i++) sum += sums[2 * i + threadIdx.x];
        share.sums[threadIdx.x * gridDim.x + share.block] = sum;
    }
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

// totals: u64 list units, u32 checksum, 0. The blocks' units become the sums up to and with them. mail: where the host waits for the totals, in its own
// memory, with a last word of 1 when they are there; null: nobody waits.
extern "C" __global__ void __launch_bounds__(1024)
zs_compress_scan(uint32_t blocks, uint8_t* __restrict__ scratch, uint32_t* __restrict__ mail) {
    ZS_SMEM(smem);
    griddep_wait();
    uint32_t* const sums = (uint32_t*)(scratch + 16);
    uint32_t carry = 0, checksum = 0;
    for (uint32_t first = 0; first < blocks; first += 4096) {
        const uint32_t i = first + 4 * threadIdx.x;
        uint32_t units[4], own = 0, total;
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            const bool mine = i + j < blocks;
            own += units[j] = mine ? sums[i + j] : 0;
            checksum += mine ? sums[blocks + i + j] : 0;
        }
        uint32_t sum = carry + block_scan(own, (uint32_t*)smem, &total);
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            sum += units[j];
            if (i + j < blocks) sums[i + j] = sum;
        }
        carry += total;
    }
    block_scan(checksum, (uint32_t*)smem, &checksum);
    if (threadIdx.x == 0) {
        uint32_t* const totals = (uint32_t*)scratch;
        totals[0] = carry, totals[1] = 0, totals[2] = checksum, totals[3] = 0;
        if (mail) {
            mail[0] = carry, mail[1] = 0, mail[2] = checksum;
            __threadfence_system();
            *(volatile uint32_t*)(mail + 3) = 1;
        }
    }
}

// A lane's weights of warp tile w, in the order of section 5. base: where the matrix ends, its smallest weight goes on, which is no escape.
ZS_DEVICE void load_pairs(const Matrix& x, uint32_t row0, uint32_t col0, uint32_t w, uint32_t base, uint32_t lane, uint32_t (&d)[16]) {
    const uint32_t row = row0 + w * 16 + (lane & 7), col = col0 + 8 * (lane >> 3);
    const bool whole = x.whole(row0, col0);
    const uint16_t* const p = x.src + row * x.ld + col;
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        const Vec4 v = whole ? ld_global_v4(p + 8 * (i / 2) * x.ld + 32 * (i & 1)) : x.load(row + 8 * (i / 2), col + 32 * (i & 1), base << 7);
        d[4 * i] = v.x, d[4 * i + 1] = v.y, d[4 * i + 2] = v.z, d[4 * i + 3] = v.w;
    }
}

extern "C" __global__ void __launch_bounds__(32 * ZS_WARPS, ZS_BLOCKS)
zs_compress_write(const uint16_t* __restrict__ src, uint64_t ld, uint32_t m, uint32_t k, const uint8_t* __restrict__ scratch, uint8_t* __restrict__ blob_ptr,
                  uint64_t h0, uint64_t h1, uint64_t h2, uint64_t h3, uint64_t h4, uint64_t h5, uint64_t h6, uint64_t h7,
                  uint64_t h8, uint64_t h9, uint64_t h10, uint64_t h11, uint64_t h12, uint64_t h13, uint64_t h14, uint64_t h15) {
    ZS_SMEM(smem);
    const Matrix x(src, ld, m, k);
    const Share share(x, (uint8_t*)scratch, gridDim.x - 1 - blockIdx.x);
    const uint32_t lane = share.lane, warp = share.warp;
    uint8_t *const spread = smem + warp * ZS_WRITE_WARP, *const masks = spread + 4096;
    // Section 1. (Blob of format.cuh keeps its pointers from the compiler, which would then not know that they are to global memory.)
    const uint64_t tiles = (uint64_t)((m + ZS_TILE - 1) / ZS_TILE) * x.col_tiles;
    uint8_t* const headers = blob_ptr + ZS_BLOB_HEADER;
    uint8_t* const fixed = headers + ((tiles * 8 + 127) & ~(uint64_t)127);
    uint8_t* const lists = fixed + tiles * ZS_FIXED;
    // The header, and the bytes between the tile headers and the fixed parts.
    if (share.block == 0 && warp == 0) {
        const uint64_t header[16] = {h0, h1, h2, h3, h4, h5, h6, h7, h8, h9, h10, h11, h12, h13, h14, h15};
#pragma unroll
        for (uint32_t i = 0; i < 16; i++)
            if (lane == i) ((uint64_t*)blob_ptr)[i] = header[i];
        for (uint8_t* gap = headers + tiles * 8 + lane; gap < fixed; gap += 32) *gap = 0;
    }
    // Lane l knows the plan of tile first + l of the block's ZS_WARPS present ones, this warp's is at `warp`. The first round has none and only loads.
    uint32_t first = share.begin + (share.end - share.begin + ZS_WARPS - 1) / ZS_WARPS * ZS_WARPS, offset = share.sums[share.block];
    uint64_t plans = 0;
    uint32_t d[4][16];
    for (;;) {
        const uint32_t t = first + warp, next = t - ZS_WARPS;
        const bool here = t < share.end, more = first > share.begin;
        const uint64_t next_plans = more && lane < ZS_WARPS && first - ZS_WARPS + lane < share.end ? share.plans[first - ZS_WARPS + lane] : 0;
        const uint32_t before = __reduce_add_sync(0xFFFFFFFFu, plan_units(lane >= warp ? next_plans : plans));  // list units from the next tile to this one
        const uint64_t plan = __shfl_sync(0xFFFFFFFFu, plans, warp);
        const uint32_t next_base = __shfl_sync(0xFFFFFFFFu, (uint32_t)(next_plans >> 32), warp) >> 16 & 0xFFu;
        const uint32_t hi = (uint32_t)(plan >> 32), count = hi & 0xFFFFu, base = hi >> 16 & 0xFFu, base2 = ZS_HALVES(base << 7);
        const bool dense = hi >> 24 & ZS_FLAG_DENSE;
        const uint32_t next_row0 = next / x.col_tiles * ZS_TILE, next_col0 = next % x.col_tiles * ZS_TILE;
        uint8_t* const words = fixed + (uint64_t)t * ZS_FIXED + lane * 16;
        uint32_t* const planes = (uint32_t*)(fixed + (uint64_t)t * ZS_FIXED + ZS_BITMAPS) + lane;
        uint8_t* const list = lists + (uint64_t)offset * 16;
        if (here && lane == 0) *(uint64_t*)(headers + (uint64_t)t * 8) = plan & 0xFFFFFFFF00000000ull | offset;
#pragma unroll
        for (uint32_t w = 0; w < 4; w++) {
            if (here) {
                Encoded e;
                encode32(d[w], base2, dense, e);
                st_stream_v4(words + w * ZS_SIGN_MANTISSA, Vec4{e.words[0], e.words[1], e.words[2], e.words[3]});
                st_stream_v4(words + w * ZS_SIGN_MANTISSA + 512, Vec4{e.words[4], e.words[5], e.words[6], e.words[7]});
#pragma unroll
                for (uint32_t p = 0; p < 3; p++) planes[96 * w + 32 * p] = e.planes[p];
                const uint32_t escapes = escapes_by_column(e.escapes);
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    const uint32_t row = w * 16 + 8 * (i / 2) + (lane & 7), chunk = 4 * (i & 1) + (lane >> 3);
                    const uint64_t eight = exponents(d[w] + 4 * i);
                    masks[8 * row + chunk] = (uint8_t)(escapes >> 8 * i);
                    *(uint64_t*)(spread + exponent_chunk(row, chunk)) = eight;
                    if (dense) *(uint64_t*)(list + 64 * row + 8 * chunk) = eight;
                }
            }
            if (more) load_pairs(x, next_row0, next_col0, w, next_base, lane, d[w]);
        }
        __syncwarp();
        if (count) write_list((const uint32_t*)masks, (uint16_t*)(masks + 512), spread, base, count, (uint32_t)plan >> 16, list, lane);
        if (!more) return;
        first -= ZS_WARPS, offset -= before, plans = next_plans;
    }
}
