// SPDX-License-Identifier: Apache-2.0
// decompress: blob -> BF16, row-major, any shape and leading dimension; all rows, or `rows` of them from row 64 * row_tile0 on.
//
// The warps of a block decode neighbouring tiles and write them out together, up to 512 bytes of a row at a time: what lies together in memory is written
// together. For the same reason blocks that come and go (a warp for each tile) are faster on large matrices than blocks that stay, which drift apart.
//
// Launch: block (32 * ZS_WARPS), dynamic shared memory ZS_DECOMPRESS_SMEM, any number of blocks is right. Limit: (compressed + raw bytes) / copy bandwidth.
// It may be launched early (programmatic dependent launch): weights are read and decoded before the kernel ahead of it has ended.
#define ZS_ESCAPE_WORDS 4
#include "format.cuh"

#ifndef ZS_WARPS
#define ZS_WARPS 4
#endif
#ifndef ZS_BLOCKS
#define ZS_BLOCKS 5  // blocks a multiprocessor
#endif
static_assert(ZS_WARPS == 1 || ZS_WARPS == 2 || ZS_WARPS == 4, "the tiles of a block are at most what a warp writes at a time");

// Per warp the decoded tile; then per warp spare bytes (Escapes::patch).
#define ZS_DECOMPRESS_SMEM (ZS_WARPS * (8192 + 128))

// Tiles first .. first + ZS_WARPS - 1 of `count` lie decoded one after the other at shared address `tiles`. This warp writes its share of the rows of all.
ZS_DEVICE void store_tiles(uint32_t tiles, uint16_t* out, uint64_t ld, uint32_t first, uint32_t count, uint32_t col_tiles, uint32_t rows, uint32_t k, bool aligned,
                           uint32_t warp, uint32_t lane) {
    const uint32_t which = lane / 8 % ZS_WARPS, t = first + which, chunk = lane & 7, tile = tiles + which * 8192;
    if (t >= count) return;
    const uint32_t row = 64 / ZS_WARPS * warp + lane / (8 * ZS_WARPS), row0 = t / col_tiles * ZS_TILE, column = t % col_tiles * ZS_TILE + 8 * chunk;
    const uint32_t step = 4 / ZS_WARPS;  // rows at a time
    uint16_t* const to = out + (uint64_t)(row0 + row) * ld + column;
    if (aligned && column + 8 <= k) {
#pragma unroll 8
        for (uint32_t i = 0; i < 16; i++)
            if (row0 + row + i * step < rows) st_stream_v4(to + i * step * ld, ld_shared_v4(tile + swizzle_chunk(row + i * step, chunk)));
        return;
    }
    for (uint32_t i = 0; i < 16 && row0 + row + i * step < rows; i++)
        for (uint32_t c = 0; c < 8 && column + c < k; c++)
            to[i * step * ld + c] = (uint16_t)ld_shared_u16(tile + swizzle_position((row + i * step) * 64 + 8 * chunk + c));
}

extern "C" __global__ void __launch_bounds__(32 * ZS_WARPS, ZS_BLOCKS)
zs_decompress(const uint8_t* __restrict__ blob_ptr, uint16_t* __restrict__ out, uint64_t ld, uint32_t m, uint32_t k, uint32_t row_tile0,
              uint32_t rows) {
    ZS_SMEM(smem);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Blob blob(blob_ptr, m, k);
    const uint64_t skip = (uint64_t)row_tile0 * blob.col_tiles;
    blob.headers += skip * 8, blob.fixed += skip * ZS_FIXED;  // lists are found by their offsets
    const uint32_t tiles = (rows + ZS_TILE - 1) / ZS_TILE * blob.col_tiles, step = gridDim.x * ZS_WARPS;
    const uint32_t all = smem_addr(smem), tile = all + warp * 8192, spare = all + ZS_WARPS * 8192 + warp * 128;
    const bool aligned = ld % 8 == 0 && (uint64_t)out % 16 == 0;
    const uint32_t block0 = blockIdx.x * ZS_WARPS, first = block0 + warp;
    griddep_launch();

    // Of the tile after the present one the words and escapes are under way, of the one after that the header.
    const uint8_t* lane_escapes = blob.escapes + 4 * lane;
    pin(lane_escapes);
    TileStream stream;
    Escapes now;
    if (first < tiles) {
        stream.load(blob.fixed + (uint64_t)first * ZS_FIXED, lane);
        now.load(lane_escapes, ld_stream_u64(blob.headers + (uint64_t)first * 8), lane);
    }
    uint64_t next_head = first + step < tiles ? ld_stream_u64(blob.headers + (uint64_t)(first + step) * 8) : 0;
    for (uint32_t t0 = block0; t0 < tiles; t0 += step) {
        const uint32_t t = t0 + warp;
        if (t < tiles) {
            stream.decode(tile, now.head().base, t + step < tiles ? blob.fixed + (uint64_t)(t + step) * ZS_FIXED : 0, lane);
            __syncwarp();
            now.patch(blob.escapes, tile, spare, lane);
            now.load(lane_escapes, next_head, lane);
            next_head = t + 2 * step < tiles ? ld_stream_u64(blob.headers + (uint64_t)(t + 2 * step) * 8) : 0;
        }
        __syncthreads();
        if (t0 == block0) griddep_wait();  // `out` may still be in use
        store_tiles(all, out, ld, t0, tiles, blob.col_tiles, rows, k, aligned, warp, lane);
        __syncthreads();
    }
    if (block0 >= tiles) griddep_wait();
}
