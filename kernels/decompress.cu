// SPDX-License-Identifier: Apache-2.0
// decompress: blob -> BF16, row-major, any shape and leading dimension.
//
// Launch: block (32 * ZS_WARPS), grid = multiprocessors x blocks that fit, dynamic shared memory ZS_DECOMPRESS_SMEM, any number of
// blocks is right. Each warp takes every (number of warps)-th tile. Limit: (compressed + raw bytes) / copy bandwidth.
#include "stream.cuh"

#ifndef ZS_WARPS
#define ZS_WARPS 8
#endif
#ifndef ZS_STAGES
#define ZS_STAGES 2
#endif

typedef TileRing<ZS_TILE, ZS_STAGES> Ring;

// Per warp: the decoded tile, the ring, its barriers.
#define ZS_WARP_SMEM (8192 + Ring::SMEM + 128)
#define ZS_DECOMPRESS_SMEM (ZS_WARPS * ZS_WARP_SMEM)

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

extern "C" __global__ void __launch_bounds__(32 * ZS_WARPS)
zs_decompress(const uint8_t* __restrict__ blob_ptr, uint16_t* __restrict__ out, uint64_t ld, uint32_t m, uint32_t k) {
    ZS_SMEM(smem);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Blob blob(blob_ptr, m, k);
    const uint32_t tiles = blob.row_tiles * blob.col_tiles, step = gridDim.x * ZS_WARPS;
    const uint32_t tile = smem_addr(smem) + warp * 8192, ring_data = smem_addr(smem) + ZS_WARPS * 8192 + warp * Ring::SMEM;
    Ring ring(ring_data, smem_addr(smem) + ZS_WARPS * (8192 + Ring::SMEM) + warp * 128, lane);
    const bool aligned = ld % 8 == 0 && (uint64_t)out % 16 == 0;

    const uint32_t first = blockIdx.x * ZS_WARPS + warp;
    uint32_t ahead = first;  // next tile to copy
    for (uint32_t s = 0; s < ZS_STAGES; s++, ahead += step) {
        if (ahead < tiles) ring.fill(blob.fixed + (uint64_t)ahead * ZS_FIXED, 0);
        else ring.fill_none();
    }
    // Headers are read two tiles ahead, escape lists one.
    Escapes now;
    if (first < tiles) now.load(blob.escapes, TileHeader(ld_stream_u64(blob.headers + (uint64_t)first * 8)), lane);
    TileHeader next_head(first + step < tiles ? ld_stream_u64(blob.headers + (uint64_t)(first + step) * 8) : 0);

    for (uint32_t t = first; t < tiles; t += step, ahead += step) {
        Escapes next;
        next.load(blob.escapes, next_head, lane);
        next_head = TileHeader(t + 2 * step < tiles ? ld_stream_u64(blob.headers + (uint64_t)(t + 2 * step) * 8) : 0);

        ring.decode(ring.wait(), tile, now.head.base);
        __syncwarp();
        ring.release();
        if (ahead < tiles) ring.fill(blob.fixed + (uint64_t)ahead * ZS_FIXED, 0);
        else ring.fill_none();
        now.patch(blob.escapes, tile, lane);
        __syncwarp();
        const uint32_t row0 = t / blob.col_tiles * ZS_TILE, col0 = t % blob.col_tiles * ZS_TILE;
        store_tile(tile, out + (uint64_t)row0 * ld + col0, ld, min(ZS_TILE, m - row0), min(ZS_TILE, k - col0), aligned, lane);
        __syncwarp();
        now = next;
    }
}
