// SPDX-License-Identifier: Apache-2.0
// decompress: blob -> BF16, row-major, any shape and leading dimension; all rows, or `rows` of them from row 64 * row_tile0 on.
//
// Launch: block (32 * ZS_WARPS), grid = multiprocessors x blocks that fit, dynamic shared memory ZS_DECOMPRESS_SMEM, any number of
// blocks is right. Each warp takes every (number of warps)-th tile. Limit: (compressed + raw bytes) / copy bandwidth.
#include "format.cuh"

#ifndef ZS_WARPS
#define ZS_WARPS 4
#endif
#ifndef ZS_BLOCKS
#define ZS_BLOCKS 5  // blocks a multiprocessor
#endif

// Per warp the decoded tile; then per warp spare bytes (Escapes::patch).
#define ZS_DECOMPRESS_SMEM (ZS_WARPS * (8192 + 128))

// Writes the decoded tile at shared address `tile` to out; rows and columns: how much of it exists.
ZS_DEVICE void store_tile(uint32_t tile, uint16_t* out, uint64_t ld, uint32_t rows, uint32_t columns, bool aligned, uint32_t lane) {
    const uint32_t chunk = lane & 7;  // eight lanes write the 128 bytes of one row
    if (aligned && columns == ZS_TILE) {
#pragma unroll 8
        for (uint32_t i = 0; i < 16; i++) {
            const uint32_t row = 4 * i + (lane >> 3);
            if (row < rows) st_stream_v4(out + row * ld + chunk * 8, ld_shared_v4(tile + swizzle_chunk(row, chunk)));
        }
        return;
    }
    for (uint32_t row = 0; row < rows; row++)
        for (uint32_t c = lane; c < columns; c += 32) out[row * ld + c] = (uint16_t)ld_shared_u16(tile + swizzle_position(row * 64 + c));
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
    const uint32_t tile = smem_addr(smem) + warp * 8192, spare = smem_addr(smem) + ZS_WARPS * 8192 + warp * 128;
    const bool aligned = ld % 8 == 0 && (uint64_t)out % 16 == 0;
    const uint32_t first = blockIdx.x * ZS_WARPS + warp;
    if (first >= tiles) return;

    // Of the tile after the present one the words and escapes are under way, of the one after that the header.
    const uint8_t* lane_escapes = blob.escapes + 4 * lane;
    pin(lane_escapes);
    TileStream stream;
    stream.load(blob.fixed + (uint64_t)first * ZS_FIXED, lane);
    Escapes now;
    now.load(lane_escapes, ld_stream_u64(blob.headers + (uint64_t)first * 8), lane);
    uint64_t next_head = first + step < tiles ? ld_stream_u64(blob.headers + (uint64_t)(first + step) * 8) : 0;
    for (uint32_t t = first; t < tiles; t += step) {
        stream.decode(tile, now.head().base, t + step < tiles ? blob.fixed + (uint64_t)(t + step) * ZS_FIXED : 0, lane);
        __syncwarp();
        now.patch(blob.escapes, tile, spare, lane);
        now.load(lane_escapes, next_head, lane);
        next_head = t + 2 * step < tiles ? ld_stream_u64(blob.headers + (uint64_t)(t + 2 * step) * 8) : 0;
        __syncwarp();
        const uint32_t row0 = t / blob.col_tiles * ZS_TILE, col0 = t % blob.col_tiles * ZS_TILE;
        store_tile(tile, out + (uint64_t)row0 * ld + col0, ld, min(ZS_TILE, rows - row0), min(ZS_TILE, k - col0), aligned, lane);
        __syncwarp();
    }
}
