// SPDX-License-Identifier: Apache-2.0
// What the wgmma kernels share: rings, partial sums, results that leave by copies.
//
// A kernel says before it includes this: ZS_N (tokens of a block's output tile), ZS_MW and ZS_KW (gemm.cuh), ZS_CLUSTER (blocks of a cluster),
// ZS_PIECES_AT_ONCE.
#pragma once
#include "gemm.cuh"

#define ZS_PLACES (ZS_MW * ZS_KW)

// As `count` arrivals at the barrier in every block of the cluster.
ZS_DEVICE void arrive_everywhere(uint32_t bar, uint32_t count = 1) {
#if ZS_CLUSTER > 1
#pragma unroll
    for (uint32_t r = 0; r < ZS_CLUSTER; r++) mbarrier_arrive_cluster(bar, r, count);
#else
    mbarrier_arrive(bar, count);
#endif
}

// A ring's stage and the parity of its present round.
struct Stage {
    uint32_t index, parity;
    ZS_DEVICE explicit Stage(uint32_t first) : index(first), parity(0) {}
    ZS_DEVICE void advance(uint32_t step, uint32_t stages) {
        index += step;
        if (index >= stages) index -= stages, parity ^= 1;
    }
};

// Adds the sums of `helpers` lower clusters, first, first - 1, .. before this one, to a strip's; as many of their pieces at once as there are registers for.
ZS_DEVICE void add_sums(float (&acc)[ZS_N / 2], float* slot, uint32_t first, uint32_t helpers) {
    constexpr uint32_t FLOATS = ZS_N / 2, AT_ONCE = ZS_PIECES_AT_ONCE, PIECES = FLOATS / 4, ROUND = PIECES < AT_ONCE ? PIECES : AT_ONCE, HELPERS = AT_ONCE / ROUND;
    constexpr uint64_t BLOCK = (uint64_t)ZS_MW * FLOATS * 128;
    static_assert(PIECES % ROUND == 0, "what is read in one round more than there is would never come");
    for (uint32_t h0 = 0; h0 < helpers; h0 += HELPERS) {
#pragma unroll
        for (uint32_t q0 = 0; q0 < PIECES; q0 += ROUND) {
            Vec4 p[HELPERS][ROUND];
            float* const theirs = slot + (blockIdx.x - (first + h0) * ZS_CLUSTER) * BLOCK + q0 * 512;
#pragma unroll
            for (uint32_t h = 0; h < HELPERS; h++)
#pragma unroll
                for (uint32_t i = 0; i < ROUND; i++)
                    if (h0 + h < helpers) p[h][i] = ld_relaxed_v4(theirs - h * ZS_CLUSTER * BLOCK + i * 512);
#pragma unroll
            for (uint32_t h = 0; h < HELPERS; h++)
                if (h0 + h < helpers)
#pragma unroll
                    for (uint32_t i = 0; i < ROUND; i++) {
                        float* const from = theirs - h * ZS_CLUSTER * BLOCK + i * 512;
                        while (is_empty(p[h][i])) p[h][i] = ld_relaxed_v4(from);
                        float* const v = acc + 4 * (q0 + i);
                        v[0] += as_float(p[h][i].x), v[1] += as_float(p[h][i].y), v[2] += as_float(p[h][i].z), v[3] += as_float(p[h][i].w);
                        st_relaxed_v4(from, Vec4{ZS_EMPTY, ZS_EMPTY, ZS_EMPTY, ZS_EMPTY});
                    }
        }
    }
}

ZS_DEVICE void publish_sums(const float (&acc)[ZS_N / 2], float* slot) {
    constexpr uint32_t PIECES = ZS_N / 8;
#pragma unroll
    for (uint32_t q = 0; q < PIECES; q++)
        put_sum(slot + blockIdx.x * ((uint64_t)ZS_MW * (ZS_N / 2) * 128) + q * 512, {acc[4 * q], acc[4 * q + 1], acc[4 * q + 2], acc[4 * q + 3]});
}

// The results of several layers' rows in one product: for so many rows of w each, a multiple of 64, a matrix of all tokens, one behind the other. (Or all rows in one.)
struct Results : Output {
    uint32_t part_rows;
    // For the strip that begins at row0: of its part, but in the numbers of all rows.
    ZS_DEVICE Output of(uint32_t row0) const {
        Output part = *this;
        part.y += row0 / part_rows * (n * ldy - part_rows);
        return part;
    }
};

// Writes a strip's results from registers: to 64 rows from row0 and 2 * SUMS tokens from token0 on.
template <uint32_t SUMS>
ZS_DEVICE void store_strip(const float (&acc)[SUMS], const Results& out, uint32_t row0, uint32_t token0, uint32_t tid) {
    const Output part = out.of(row0);
#pragma unroll
    for (uint32_t q = 0; q < SUMS / 4; q++) part.store({acc[4 * q], acc[4 * q + 1], acc[4 * q + 2], acc[4 * q + 3]}, row0 + tid / 32 * 16, token0 + q * 8, tid % 32);
}

// The same by the copy engine, through 256 * SUMS bytes of shared memory at `at`, 1024-byte aligned. A copy
// to global memory of thread 0's (bulk_copies_read); `barrier` is a named one of the warpgroup.
template <uint32_t SUMS>
ZS_DEVICE void send_strip(const float (&acc)[SUMS], const Results& out, const TensorMap& y_map, uint32_t row0, uint32_t token0, uint32_t barrier, uint32_t tid, uint32_t at) {
    const uint32_t lane = tid % 32, warp = tid / 32, row = row0 + warp * 16 + lane / 4;
    const float b0 = out.bias && row < out.m ? as_float((uint32_t)out.bias[row] << 16) : 0.0f, b1 = out.bias && row + 8 < out.m ? as_float((uint32_t)out.bias[row + 8] << 16) : 0.0f;
    // Of 16 tokens at a time four matrices: rows 0 to 7 and 8 to 15 of the first eight, of the others. Lanes 8 i .. 8 i + 7 have the addresses of matrix i.
    const uint32_t token = lane / 16 * 8 + lane % 8, to = at + swizzle_chunk(token, warp * 2 + lane / 8 % 2);
#pragma unroll
    for (uint32_t q = 0; q < SUMS / 4; q += 2) {
        const float* const v = acc + 4 * q;
        store_matrices_transposed(to + q * 1024, {pack_bf16(v[0] + b0, v[1] + b0), pack_bf16(v[2] + b1, v[3] + b1), pack_bf16(v[4] + b0, v[5] + b0), pack_bf16(v[6] + b1, v[7] + b1)});
    }
    fence_proxy_async();
    named_barrier_sync(barrier, 128);
    const uint32_t part = row0 / out.part_rows;
    if (tid == 0) tensor_store(y_map, TensorRows{out.y, out.ldy, out.n, out.part_rows, 2 * SUMS, out.m / out.part_rows}, row0 - part * out.part_rows, token0, part, at);
}
