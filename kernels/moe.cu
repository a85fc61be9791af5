// SPDX-License-Identifier: Apache-2.0
// The small kernels around a mixture-of-experts layer's grouped products: zs_moe_route turns the router's choice into items (routing.cuh), zs_moe_combine adds up what a
// token's experts gave. They exist because torch needs about ten launches for each, of about 2 us, beside products of 20.
//
// zs_moe_route: one block of ZS_THREADS, dynamic shared memory ZS_ROUTE_SMEM; at most ZS_ROUTE_PAIRS pairs and ZS_THREADS experts. The list is the same whatever the
// schedule: no atomics, each expert's pairs are counted by threads of one warp.
// zs_moe_combine: block ZS_COMBINE_THREADS, grid (ceil(m / 8 / ZS_COMBINE_THREADS), tokens), dynamic shared memory ZS_COMBINE_SMEM; top <= 32.
// Both may be launched early (programmatic dependent launch).
#include "bits.cuh"
#include "routing.cuh"

#define ZS_THREADS 1024
#define ZS_ROUTE_PAIRS 4096
#define ZS_ROUTE_SMEM (4 * ZS_ROUTE_PAIRS + 8 * ZS_THREADS)
#define ZS_COMBINE_THREADS 128
#define ZS_COMBINE_SMEM (65 * 4)

// An expert's number, or ~0 where it is none of `experts`.
ZS_DEVICE uint32_t read_expert(const uint8_t* ids, uint32_t id_bytes, uint32_t pair, uint32_t experts) {
    const int64_t id = id_bytes == 8 ? ((const int64_t*)ids)[pair] : (int64_t)((const int32_t*)ids)[pair];
    return id >= 0 && id < (int64_t)experts ? (uint32_t)id : ~0u;
}

extern "C" __global__ void __launch_bounds__(ZS_THREADS)
zs_moe_route(const uint8_t* ids, uint32_t id_bytes, uint32_t pairs, uint32_t top, uint32_t experts, uint32_t tile, uint32_t* words) {
    ZS_SMEM(smem);
    uint32_t *const expert_of = (uint32_t*)smem, *const counts = expert_of + ZS_ROUTE_PAIRS, *const item_of = counts + ZS_THREADS;  // of an expert, then where it begins
    griddep_launch();
    griddep_wait();
    for (uint32_t p = threadIdx.x; p < pairs; p += ZS_THREADS) expert_of[p] = read_expert(ids, id_bytes, p, experts);
    __syncthreads();

    // `parts` neighbouring threads share an expert, each a part of the pairs. Parts of odd length lie in different banks.
    uint32_t parts = 1;
    while (parts < 32 && 2 * parts * experts <= ZS_THREADS) parts *= 2;
    const uint32_t e = threadIdx.x / parts, part = threadIdx.x % parts, length = ((pairs + parts - 1) / parts) | 1;
    const uint32_t begin = min(part * length, pairs), end = e < experts ? min(begin + length, pairs) : begin;
    uint32_t mine = 0;
    for (uint32_t p = begin; p < end; p++) mine += expert_of[p] == e;
    uint32_t sum = mine;  // of this part and those before it
    for (uint32_t d = 1; d < parts; d *= 2) {
        const uint32_t other = __shfl_up_sync(0xFFFFFFFFu, sum, d);
        if (part >= d) sum += other;
    }
    const uint32_t count = __shfl_sync(0xFFFFFFFFu, sum, threadIdx.x % 32 / parts * parts + parts - 1);
    if (part == 0 && e < experts) counts[e] = count, item_of[e] = (count + tile - 1) / tile;
    __syncthreads();

    // One warp: where each expert's pairs and items begin.
    if (threadIdx.x < 32) {
        const uint32_t run = (experts + 31) / 32, from = min(threadIdx.x * run, experts), to = min(from + run, experts);
        uint32_t pairs_here = 0, items_here = 0;
        for (uint32_t i = from; i < to; i++) pairs_here += counts[i], items_here += item_of[i];
        uint32_t pairs_to = pairs_here, items_to = items_here;
        for (uint32_t d = 1; d < 32; d *= 2) {
            const uint32_t p = __shfl_up_sync(0xFFFFFFFFu, pairs_to, d), i = __shfl_up_sync(0xFFFFFFFFu, items_to, d);
            if (threadIdx.x >= d) pairs_to += p, items_to += i;
        }
        if (threadIdx.x == 31) words[0] = items_to;
        uint32_t first_pair = pairs_to - pairs_here, first_item = items_to - items_here;
        for (uint32_t i = from; i < to; i++) {
            const uint32_t p = counts[i], n = item_of[i];
            counts[i] = first_pair, item_of[i] = first_item;
            first_pair += p, first_item += n;
        }
    }
    __syncthreads();

    if (e >= experts) return;
    uint32_t* const list = words + ZS_ROUTING_HEAD + (uint64_t)ZS_ROUTING_ITEM * pairs;
    uint32_t at = counts[e] + sum - mine;
    for (uint32_t p = begin; p < end; p++)
        if (expert_of[p] == e) list[at] = p, list[pairs + at++] = p / top;
    for (uint32_t i = part; i * tile < count; i += parts) {
        uint32_t* const item = words + ZS_ROUTING_HEAD + (uint64_t)ZS_ROUTING_ITEM * (item_of[e] + i);
        item[0] = e, item[1] = counts[e] + i * tile, item[2] = min(tile, count - i * tile), item[3] = 0;
    }
}

// out[token] = sum over its experts of weights[token, slot] * y[token * top + slot], in FP32 and in the order of the experts' numbers.
extern "C" __global__ void __launch_bounds__(ZS_COMBINE_THREADS)
zs_moe_combine(const uint16_t* y, const uint8_t* ids, uint32_t id_bytes, const float* weights, uint32_t top, uint32_t experts, uint32_t m, uint16_t* out) {
    ZS_SMEM(smem);
    uint32_t *const slots = (uint32_t*)smem, *const used = slots + 64;
    float* const factors = (float*)(slots + 32);
    griddep_launch();
    griddep_wait();
    const uint32_t token = blockIdx.y;
    if (threadIdx.x < 32) {
        const uint32_t lane = threadIdx.x, id = lane < top ? read_expert(ids, id_bytes, token * top + lane, experts) : ~0u;
        uint32_t rank = 0;
        for (uint32_t i = 0; i < top; i++) {
            const uint32_t other = __shfl_sync(0xFFFFFFFFu, id, (int)i);
            rank += other < id || (other == id && i < lane);
        }
        if (id != ~0u) slots[rank] = lane, factors[rank] = weights[token * top + lane];
        const uint32_t valid = __ballot_sync(0xFFFFFFFFu, id != ~0u);
        if (lane == 0) *used = (uint32_t)__popc(valid);
    }
    __syncthreads();
    const uint32_t column = (blockIdx.x * ZS_COMBINE_THREADS + threadIdx.x) * 8, count = *used;
    if (column >= m) return;
    float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    const bool whole = m % 8 == 0 && ((uint64_t)y | (uint64_t)out) % 16 == 0;
    for (uint32_t i = 0; i < count; i++) {
        const uint16_t* const from = y + (uint64_t)(token * top + slots[i]) * m + column;
        const float f = factors[i];
        uint32_t v[4] = {0, 0, 0, 0};
        if (whole) {
            const Vec4 p = ld_global_v4(from);
            v[0] = p.x, v[1] = p.y, v[2] = p.z, v[3] = p.w;
        } else {
#pragma unroll
            for (uint32_t c = 0; c < 8; c++)
                if (column + c < m) v[c / 2] |= (uint32_t)from[c] << 16 * (c & 1);
        }
#pragma unroll
        for (uint32_t c = 0; c < 4; c++) sum[2 * c] += f * as_float(v[c] << 16), sum[2 * c + 1] += f * as_float(v[c] & 0xFFFF0000u);
    }
    uint16_t* const to = out + (uint64_t)token * m + column;
    const uint32_t r[4] = {pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]), pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7])};
    if (whole) {
        st_global_v4(to, Vec4{r[0], r[1], r[2], r[3]});
    } else {
#pragma unroll
        for (uint32_t c = 0; c < 8; c++)
            if (column + c < m) to[c] = (uint16_t)(r[c / 2] >> 16 * (c & 1));
    }
}
