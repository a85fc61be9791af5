// SPDX-License-Identifier: Apache-2.0
// compress: BF16, row-major -> blob, the same bytes as core/codec writes, in one pass: every weight is read once. Limit: (raw + compressed) bytes / bandwidth.
//
//   zs_compress_sample  plans some tiles and tells the host what their lists take, so that it can allocate the blob; clears the scratch memory.
//   zs_compress         a warp for a tile: reads it, chooses its window, writes the fixed part and, a tile later, when its block knows where it goes, its
//                       list. The last block to end writes the header (section 2), which needs the size and the checksum, and tells them to the host.
//
// A block takes groups of ZS_WARPS neighbouring tiles in turn, by a counter. Its last warp has no tile: it tells the other blocks the units of a group's
// lists as soon as they are known, finds out where they start by looking back at what others have told, and takes the number of a later group, all of it while
// the others write the lists of the group before and the fixed parts of this one. Weights come by asynchronous copies into two buffers for each warp: the
// next tile is under way while this one is written.
//
// What blocks tell: the units of a group, and the sum up to and with it as soon as it is known where it starts; both are words that are their own flags
// (0: not there yet), so nothing has to be in order. A block waits for groups only that are lower than one whose tiles it has planned, and plans its
// groups in order, and for the last group only when it has no other to do: of those that are not done the lowest one's block waits for nothing, however few
// blocks fit on the GPU.
//
// Launch: dynamic shared memory ZS_SAMPLE_SMEM, block 32 * ZS_WARPS, grid: a warp for each sample; ZS_COMPRESS_SMEM, block 32 * (ZS_WARPS + 1), any grid.
// scratch: 16 bytes of results, for a host that gets no mail | Look (below), which zs_compress_sample clears.
// mail: where the host waits, in its own memory: two words of results, and a fourth word of 1 when they are there.
#include "encode.cuh"
#include "tally.cuh"

#ifndef ZS_WARPS
#define ZS_WARPS 4
#endif
#ifndef ZS_BLOCKS
#define ZS_BLOCKS 3  // blocks a multiprocessor
#endif
#define ZS_COUNTS ((ZS_COUNTERS * 4 + 15) / 16 * 16)            // a histogram, or positions of escapes
#define ZS_WARP_SMEM (2 * ZS_RAW + 512 + ZS_COUNTS)             // two tiles; a bit for each position of one; ZS_COUNTS
#define ZS_COMPRESS_SMEM (ZS_WARPS * ZS_WARP_SMEM + sizeof(Board))
#define ZS_SAMPLE_SMEM (ZS_WARPS * (ZS_RAW + ZS_COUNTS + 16))
#define ZS_RAW 8192u    // bytes of a tile's weights
#define ZS_LOOK 128u    // groups that a warp looks at together
static_assert(2 * ZS_LIST_STAGE <= ZS_COUNTS, "the stage of a list lies where the histogram was");

struct Matrix {
    const uint16_t* src;
    uint64_t ld;
    uint32_t m, k, col_tiles;
    bool aligned;
    ZS_DEVICE Matrix(const uint16_t* src_, uint64_t ld_, uint32_t m_, uint32_t k_) : src(src_), ld(ld_), m(m_), k(k_) {
        col_tiles = (k + ZS_TILE - 1) / ZS_TILE;
        aligned = ld % 8 == 0 && (uint64_t)src % 16 == 0;
    }
    ZS_DEVICE uint32_t tiles() const { return (m + ZS_TILE - 1) / ZS_TILE * col_tiles; }
    ZS_DEVICE bool whole(uint32_t row0, uint32_t col0) const { return aligned && row0 + ZS_TILE <= m && col0 + ZS_TILE <= k; }
    ZS_DEVICE uint32_t count(uint32_t row0, uint32_t col0) const { return min(ZS_TILE, m - row0) * min(ZS_TILE, k - col0); }
    // Two weights from (row, col) on; 0 where the matrix ends.
    ZS_DEVICE uint32_t pair(uint32_t row, uint32_t col) const {
        const uint16_t* const p = src + row * ld + col;
        const uint32_t lo = row < m && col < k ? p[0] : 0, hi = row < m && col + 1 < k ? p[1] : 0;
        return lo | hi << 16;
    }
};

// Section 7.
ZS_DEVICE uint32_t row_factor(uint32_t x) {
    x ^= x >> 16, x *= 0x7FEB352Du, x ^= x >> 15, x *= 0x846CA68Bu, x ^= x >> 16;
    return x | 1;
}
// The factors of two columns as bytes: lower halves, upper halves.
ZS_DEVICE uint32_t column_factors(uint32_t c) { return byte_perm(c * 0x9E3779B1u | 0x10000u, (c + 1) * 0x9E3779B1u | 0x10000u, 0x7362); }

// Begins to bring a tile to shared memory, by one warp; zeros where the matrix ends. fetched() waits for it.
ZS_DEVICE void fetch(const Matrix& x, uint32_t row0, uint32_t col0, uint8_t* tile, uint32_t lane) {
    if (x.aligned) {
        const uint32_t row = row0 + lane / 8, col = col0 + 8 * (lane % 8), bytes = col < x.k ? min(16u, 2 * (x.k - col)) : 0;
        const uint16_t* const p = x.src + row * x.ld + col;
#pragma unroll
        for (uint32_t i = 0; i < 16; i++) {
            const uint32_t here = row + 4 * i < x.m ? bytes : 0;
            cp_async_16_zfill(smem_addr(tile + swizzle_chunk(4 * i + lane / 8, lane % 8)), here ? p + 4 * i * x.ld : x.src, here);
        }
    } else {
#pragma unroll 8
        for (uint32_t i = 0; i < ZS_TILE; i++) *(uint32_t*)(tile + swizzle_chunk(i, lane / 4) + 4 * (lane % 4)) = x.pair(row0 + i, col0 + 2 * lane);
    }
    cp_async_commit();
}
ZS_DEVICE void fetched() {
    cp_async_wait<0>();
    __syncwarp();
}

// A lane's weights of warp tile w in the order of section 5.
ZS_DEVICE void read_warp_tile(const uint8_t* tile, uint32_t w, uint32_t lane, uint32_t* d) {
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        const Vec4 v = ld_shared_v4(smem_addr(tile + swizzle_chunk(16 * w + 8 * (i / 2) + (lane & 7), 4 * (i & 1) + (lane >> 3))));
        d[4 * i] = v.x, d[4 * i + 1] = v.y, d[4 * i + 2] = v.z, d[4 * i + 3] = v.w;
    }
}
// All of them: pair p of warp tile w at 16 w + p.
ZS_DEVICE void read_tile(const uint8_t* tile, uint32_t lane, uint32_t (&d)[64]) {
#pragma unroll
    for (uint32_t w = 0; w < 4; w++) read_warp_tile(tile, w, lane, d + 16 * w);
}

// How often each exponent occurs among the weights of a tile.
ZS_DEVICE void count_exponents(const Matrix& x, uint32_t row0, uint32_t col0, const uint8_t* tile, uint32_t* histogram, uint32_t lane) {
    for (uint32_t i = lane; i < 256; i += 32) histogram[i] = 0;
    __syncwarp();
    const uint32_t columns = min(ZS_TILE, x.k - col0), all = x.count(row0, col0);
    for (uint32_t i = lane; i < all; i += 32) {
        const uint32_t row = i / columns, col = i % columns;
        atomicAdd(histogram + (*(const uint16_t*)(tile + swizzle_chunk(row, col / 8) + 2 * (col % 8)) >> 7 & 0xFFu), 1u);
    }
}

// Where the matrix ends, weights of warp tile w with the exponent of the tile's base: they are no escapes.
ZS_DEVICE void pad_warp_tile(const Matrix& x, uint32_t row0, uint32_t col0, uint32_t w, uint32_t base, uint32_t lane, uint32_t* d) {
    const uint32_t row = row0 + 16 * w + (lane & 7), col = col0 + 8 * (lane >> 3);
#pragma unroll
    for (uint32_t i = 0; i < 16; i++) {
        const uint32_t at = col + 32 * (i / 4 & 1) + 2 * (i & 3);
        const uint32_t inside = row + 8 * (i / 8) >= x.m || at >= x.k ? 0 : at + 1 == x.k ? 0xFFFFu : 0xFFFFFFFFu;
        d[i] = select_bits(ZS_HALVES(base << 7), d[i], inside);
    }
}

// What the lanes of a warp find in a tile: the largest and the smallest of two halves without signs, and a part of the checksum.
struct Found {
    uint32_t most, least, checksum;
    ZS_DEVICE Found() : most(0), least(ZS_EACH(0x7C00)), checksum(0) {}
    ZS_DEVICE void add(uint32_t pair) {
        const uint32_t v = abs_halves(pair);
        most = max_halves(most, v), least = min_halves(least, v);
    }
};

ZS_DEVICE void find(const uint32_t (&d)[64], Found& found) {
#pragma unroll
    for (uint32_t i = 0; i < 64; i++) found.add(d[i]);
}

// The same and the checksum; padding is 0. (Each lane computes the factors of its rows: to share them out costs no less.)
ZS_DEVICE void find_and_sum(const uint32_t (&d)[64], uint32_t row0, uint32_t col0, uint32_t lane, Found& found) {
    uint32_t Q[8], low = 0, high = 0;
#pragma unroll
    for (uint32_t j = 0; j < 8; j++) Q[j] = column_factors(col0 + 8 * (lane >> 3) + 32 * (j / 4) + 2 * (j & 3));
#pragma unroll
    for (uint32_t r = 0; r < 8; r++) {
        const uint32_t a = row_factor(row0 + 8 * r + (lane & 7));
        int32_t l = 0, h = 0;
#pragma unroll
        for (uint32_t j = 0; j < 8; j++) {
            const uint32_t v = d[8 * r + j];
            l = dot_low(v, Q[j], l), h = dot_high(v, Q[j], h);
            found.add(v);
        }
        low += (uint32_t)l * a, high += (uint32_t)h * a;
    }
    found.checksum = low + (high << 8);
}

// histogram: ZS_COUNTERS words of shared memory of this warp.
ZS_DEVICE uint64_t plan_tile(const Matrix& x, const uint32_t (&d)[64], const Found& found, uint32_t row0, uint32_t col0, const uint8_t* tile, uint32_t* histogram, uint32_t lane) {
    const uint32_t most = __reduce_max_sync(0xFFFFFFFFu, max(found.most & 0xFFFFu, found.most >> 16));
    const uint32_t least = __reduce_min_sync(0xFFFFFFFFu, min(found.least & 0xFFFFu, found.least >> 16));
    uint64_t plan;
    if (!choose_by_thresholds(d, most, least, x.count(row0, col0), plan)) {
        count_exponents(x, row0, col0, tile, histogram, lane);
        plan = choose_by_histogram(histogram, lane);
    }
    return plan;
}

ZS_DEVICE void send(uint32_t* results, uint32_t* mail, uint32_t a, uint32_t b) {
    results[0] = a, results[1] = b;
    mail[0] = a, mail[1] = b;
    __threadfence_system();
    *(volatile uint32_t*)(mail + 3) = 1;
}

// samples: at most 1024 (and at most all tiles: then each of them), spread evenly. clear: 16-byte pieces of scratch memory behind the results. sum: a word
// that is 0, and is again when the mail is there. Results: the list units of the samples, and the sum of their squares.
extern "C" __global__ void __launch_bounds__(32 * ZS_WARPS)
zs_compress_sample(const uint16_t* __restrict__ src, uint64_t ld, uint32_t m, uint32_t k, uint8_t* __restrict__ scratch, uint32_t* __restrict__ mail, uint32_t clear,
                   uint32_t samples, unsigned long long* __restrict__ sum) {
    ZS_SMEM(smem);
    const Matrix x(src, ld, m, k);
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, s = blockIdx.x * ZS_WARPS + warp;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < clear; i += gridDim.x * blockDim.x) *((Vec4*)scratch + 1 + i) = Vec4{0, 0, 0, 0};
    uint32_t* const units = (uint32_t*)smem;
    if (s < samples) {
        // One of each `of` tiles, not always the same one: what repeats in a matrix is not to be taken for all of it.
        const uint32_t tiles = x.tiles(), of = tiles / samples, t = (uint32_t)((uint64_t)s * tiles / samples) + (s * 0x9E3779B1u >> 8) % of;
        const uint32_t row0 = t / x.col_tiles * ZS_TILE, col0 = t % x.col_tiles * ZS_TILE;
        uint8_t* const tile = smem + 16 * ZS_WARPS + warp * (ZS_RAW + ZS_COUNTS);
        fetch(x, row0, col0, tile, lane);
        fetched();
        uint32_t d[64];
        read_tile(tile, lane, d);
        Found found;
        find(d, found);
        const uint64_t plan = plan_tile(x, d, found, row0, col0, tile, (uint32_t*)(tile + ZS_RAW), lane);
        if (lane == 0) units[warp] = plan_units(plan);
    } else if (lane == 0) {
        units[warp] = 0;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned long long all = 1ull << 52;  // blocks, 12 bits | units, 20 bits | squares
        for (uint32_t i = 0; i < ZS_WARPS; i++) all += (unsigned long long)units[i] << 32 | units[i] * units[i];
        all += atomicAdd(sum, all);
        if (all >> 52 == gridDim.x) {
            *sum = 0;
            send((uint32_t*)scratch, mail, (uint32_t)(all >> 32) & 0xFFFFFu, (uint32_t)all);
        }
    }
}

// What the blocks of zs_compress tell each other.
struct Look {
    unsigned long long* done;  // blocks that have ended, and in the upper half the sum of their checksums
    uint32_t* number;          // of the group that is taken next
    uint32_t *own, *through;   // 1 + the list units of a group, and 1 + those up to and with it; as many words as groups, in full windows
    ZS_DEVICE Look(uint8_t* scratch, uint32_t groups) {
        done = (unsigned long long*)(scratch + 16), number = (uint32_t*)(scratch + 24);
        own = (uint32_t*)(scratch + 32), through = own + (groups + ZS_LOOK - 1) / ZS_LOOK * ZS_LOOK;
    }
    // By one warp: the list units of all groups before `group`.
    ZS_DEVICE uint32_t before(uint32_t group, uint32_t lane) const {
        uint32_t sum = 0;
        for (uint32_t window = (group + ZS_LOOK - 1) / ZS_LOOK; window-- > 0;) {
            const uint32_t first = window * ZS_LOOK + 4 * lane;
            for (;;) {
                const Vec4 o = ld_relaxed_v4(own + first), t = ld_relaxed_v4(through + first);
                const uint32_t owns[4] = {o.x, o.y, o.z, o.w}, throughs[4] = {t.x, t.y, t.z, t.w};
                uint32_t part = 0;
                bool ends = false, waits = false;  // at the highest group whose sum is known; at one that knows nothing
#pragma unroll
                for (uint32_t j = 4; j-- > 0;) {
                    if (first + j >= group || ends || waits) continue;
                    ends = throughs[j] != 0, waits = !ends && owns[j] == 0;
                    part += ends ? throughs[j] - 1 : waits ? 0 : owns[j] - 1;
                }
                const uint32_t end = __ballot_sync(0xFFFFFFFFu, ends), wait = __ballot_sync(0xFFFFFFFFu, waits);
                const uint32_t last = end ? 31 - (uint32_t)__clz((int)end) : 0;  // lanes below do not matter
                if (wait >> last) {
                    __nanosleep(20);
                    continue;
                }
                sum += __reduce_add_sync(0xFFFFFFFFu, lane >= last ? part : 0);
                if (end) return sum;
                break;
            }
        }
        return sum;
    }
};

// What the warps of a block tell each other, of this group and the one before or after it in turn.
struct Board {
    uint32_t units[2][ZS_WARPS], starts[2][ZS_WARPS];  // of a tile's list
    uint32_t numbers[2];                               // of groups
    uint32_t checksums[ZS_WARPS], total;               // list units of the matrix
};

// The header of a blob, section 2.
struct Header {
    uint64_t words[16];
};

// What a bit of the size and of the checksum, bytes 96 to 107, adds to the CRC, which is linear: bit `lane` of each of three words. It takes some
// microseconds to find out.
ZS_DEVICE void crc_parts(uint32_t lane, uint32_t (&parts)[3]) {
    uint32_t crc = 0x82F63B78u;
    const auto pass = [&](uint32_t bits) {
#pragma unroll 1
        for (uint32_t b = 0; b < bits; b++) crc = crc >> 1 ^ (crc & 1 ? 0x82F63B78u : 0);
    };
    pass(31 - lane + 8 * (124 - 108));
    parts[2] = crc, pass(32);
    parts[1] = crc, pass(32);
    parts[0] = crc;
}

// One warp: the header of a blob with that many list units; `header` is that of one without lists whose checksum is 0.
ZS_DEVICE void write_header(const Header& header, const uint32_t (&parts)[3], uint64_t units, uint32_t checksum, uint8_t* blob, uint32_t lane) {
    const uint32_t words[3] = {(uint32_t)units << 4, (uint32_t)(units >> 28), checksum};
    uint32_t crc = 0;
#pragma unroll
    for (uint32_t i = 0; i < 3; i++) crc ^= words[i] >> lane & 1 ? parts[i] : 0;
    crc = __reduce_xor_sync(0xFFFFFFFFu, crc);
#pragma unroll
    for (uint32_t i = 0; i < 16; i++) {
        const uint64_t changed = i == 12 ? units << 4 : i == 13 ? checksum : i == 15 ? (uint64_t)crc << 32 : 0;
        if (lane == i) *((uint64_t*)blob + i) = header.words[i] ^ changed;
    }
}

// blob: null: sizes and checksum only. room: the list units that it has room for; lists beyond are not written, and the host sees that by the total. What
// is left of it, if not more than `spare` units, is set to 0. Results: list units, checksum.
extern "C" __global__ void __launch_bounds__(32 * (ZS_WARPS + 1), ZS_BLOCKS)
zs_compress(const uint16_t* __restrict__ src, uint64_t ld, uint32_t m, uint32_t k, uint8_t* __restrict__ scratch, uint32_t* __restrict__ mail,
            uint8_t* __restrict__ blob, uint32_t room, uint32_t spare, const Header header) {
    ZS_SMEM(smem);
    const Matrix x(src, ld, m, k);
    const uint32_t lane = threadIdx.x % 32, warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0), tiles = x.tiles(), groups = (tiles + ZS_WARPS - 1) / ZS_WARPS;
    const Look look(scratch, groups);
    Board& board = *(Board*)(smem + ZS_WARPS * ZS_WARP_SMEM);
    // A group's barrier: its units are there; so is where the lists of the group before it start, and the number of the group after it.
    const uint32_t barrier = 1, all = 32 * (ZS_WARPS + 1);
    if (threadIdx.x == 32 * ZS_WARPS) board.numbers[0] = atomicAdd(look.number, 1u);
    __syncthreads();
    uint32_t group = __shfl_sync(0xFFFFFFFFu, board.numbers[0], 0);
    uint32_t parts[3] = {0, 0, 0}, checksum = 0;
    if (warp == ZS_WARPS) {
        crc_parts(lane, parts);  // while the first tiles come
        uint32_t next = lane == 0 ? atomicAdd(look.number, 1u) : 0;
        if (lane == 0) board.numbers[1] = next;
        for (uint32_t odd = 0; group < groups; odd ^= 1) {
            named_barrier_sync(barrier, all);
            const uint32_t own = lane < ZS_WARPS ? board.units[odd][lane] : 0;
            uint32_t through = own;
#pragma unroll
            for (uint32_t d = 1; d < ZS_WARPS; d *= 2) {
                const uint32_t up = __shfl_up_sync(0xFFFFFFFFu, through, d);
                if (lane >= d) through += up;
            }
            const uint32_t units = __shfl_sync(0xFFFFFFFFu, through, ZS_WARPS - 1);
            if (lane == 0) atomicExch(look.own + group, units + 1);
            const uint32_t start = look.before(group, lane);
            if (lane < ZS_WARPS) board.starts[odd][lane] = start + through - own;
            if (lane == 0) atomicExch(look.through + group, start + units + 1);
            group = __shfl_sync(0xFFFFFFFFu, next, 0);
            if (lane == 0) board.numbers[odd] = next = atomicAdd(look.number, 1u);
        }
        named_barrier_sync(barrier, all);
    } else {
        // Section 1. (Blob of format.cuh keeps its pointers from the compiler, which would then not know that they are to global memory.)
        uint8_t* const headers = blob + ZS_BLOB_HEADER;
        uint8_t* const fixed = headers + ((tiles * (uint64_t)8 + 127) & ~(uint64_t)127);
        uint8_t *const buffers = smem + warp * ZS_WARP_SMEM, *const masks = buffers + 2 * ZS_RAW;
        uint16_t* const stage = (uint16_t*)(masks + 512);
        const auto begin = [&](uint32_t t, uint32_t odd) {
            if (t < tiles) fetch(x, t / x.col_tiles * ZS_TILE, t % x.col_tiles * ZS_TILE, buffers + odd * ZS_RAW, lane);
        };
        // The header and the list of tile t, which is in buffer `odd`.
        const auto finish = [&](uint32_t t, uint64_t plan, uint32_t odd) {
            const uint32_t hi = (uint32_t)(plan >> 32), count = hi & 0xFFFFu, base = hi >> 16 & 0xFFu, offset = board.starts[odd][warp];
            uint8_t *const list = fixed + (uint64_t)tiles * ZS_FIXED + (uint64_t)offset * 16, *const tile = buffers + odd * ZS_RAW;
            if (lane == 0) *(uint64_t*)(headers + (uint64_t)t * 8) = plan & 0xFFFFFFFF00000000ull | offset;
            if (offset + plan_units(plan) <= room) {
                if (count) write_list((const uint32_t*)masks, stage, tile, base, count, (uint32_t)plan >> 16, list, lane);
                if (hi >> 24 & ZS_FLAG_DENSE) write_dense(tile, list, lane);
            }
        };
        uint32_t odd = 0, t = group * ZS_WARPS + warp, before = tiles;  // before: the tile whose list is to be written
        uint64_t plan_before = 0;
        begin(t, 0);
        for (; group < groups; odd ^= 1) {
            uint8_t* const tile = buffers + odd * ZS_RAW;
            const bool here = t < tiles;
            const uint32_t row0 = t / x.col_tiles * ZS_TILE, col0 = t % x.col_tiles * ZS_TILE;
            uint64_t plan = 0;
            fetched();
            if (here) {
                uint32_t d[64];
                read_tile(tile, lane, d);
                Found found;
                find_and_sum(d, row0, col0, lane, found);
                checksum += found.checksum;
                plan = plan_tile(x, d, found, row0, col0, tile, (uint32_t*)stage, lane);
            }
            if (lane == 0) board.units[odd][warp] = plan_units(plan);
            named_barrier_sync(barrier, all);
            group = __shfl_sync(0xFFFFFFFFu, board.numbers[odd ^ 1], 0);
            if (before < tiles && blob) finish(before, plan_before, odd ^ 1);
            __syncwarp();  // all have read the tile before, and its masks
            const uint32_t next = group * ZS_WARPS + warp;
            begin(next, odd ^ 1);
            if (here && blob) {
                const uint32_t base = (uint32_t)(plan >> 48) & 0xFFu;
                const bool dense = plan >> 56 & ZS_FLAG_DENSE, whole = x.whole(row0, col0);
                uint8_t* words = fixed + (uint64_t)t * ZS_FIXED + lane * 16;
                uint32_t* planes = (uint32_t*)(fixed + (uint64_t)t * ZS_FIXED + ZS_BITMAPS) + lane;
                uint8_t* mask = masks + 8 * (lane & 7) + (lane >> 3);
#pragma unroll 1
                for (uint32_t w = 0; w < 4; w++, words += ZS_SIGN_MANTISSA, planes += 96, mask += 128) {
                    uint32_t d[16];
                    read_warp_tile(tile, w, lane, d);
                    if (!whole) pad_warp_tile(x, row0, col0, w, base, lane, d);
                    Encoded e;
                    encode32(d, ZS_HALVES(base << 7), dense, e);
                    st_stream_v4(words, Vec4{e.words[0], e.words[1], e.words[2], e.words[3]});
                    st_stream_v4(words + 512, Vec4{e.words[4], e.words[5], e.words[6], e.words[7]});
#pragma unroll
                    for (uint32_t p = 0; p < 3; p++) planes[32 * p] = e.planes[p];
                    const uint32_t escapes = escapes_by_column(e.escapes);
#pragma unroll
                    for (uint32_t i = 0; i < 4; i++) mask[64 * (i / 2) + 4 * (i & 1)] = (uint8_t)(escapes >> 8 * i);
                }
                if (t == 0)  // the bytes between the tile headers and the fixed parts
                    for (uint8_t* gap = headers + tiles * (uint64_t)8 + lane; gap < fixed; gap += 32) *gap = 0;
            }
            before = here ? t : tiles, plan_before = plan, t = next;
        }
        named_barrier_sync(barrier, all);
        if (before < tiles && blob) finish(before, plan_before, odd ^ 1);
    }
    checksum = __reduce_add_sync(0xFFFFFFFFu, checksum);
    if (lane == 0 && warp < ZS_WARPS) board.checksums[warp] = checksum;
    if (threadIdx.x == 32 * ZS_WARPS) {
        // A block waits for others only when all its groups are done, and all groups are taken: the last one's sum is on its way.
        uint32_t through;
        while ((through = atomicAdd(look.through + groups - 1, 0u)) == 0) __nanosleep(100);
        board.total = through - 1;
    }
    __syncthreads();
    const uint32_t total = board.total;
    const bool complete = blob && total <= room;
    if (warp == ZS_WARPS) {
        checksum = __reduce_add_sync(0xFFFFFFFFu, lane < ZS_WARPS ? board.checksums[lane] : 0);
        unsigned long long before = lane == 0 ? atomicAdd(look.done, (unsigned long long)checksum << 32 | 1) : 0;
        before = __shfl_sync(0xFFFFFFFFu, before, 0);
        if ((uint32_t)before == gridDim.x - 1) {  // the last block to end
            const uint32_t sum = (uint32_t)(before >> 32) + checksum;
            if (lane == 0) send((uint32_t*)scratch, mail, total, sum);
            if (complete) write_header(header, parts, total, sum, blob, lane);
        }
    }
    if (complete && room - total <= spare) {  // by all blocks: for one it takes 30 us at half a billion weights
        Vec4* const lists = (Vec4*)(blob + ZS_BLOB_HEADER + ((tiles * (uint64_t)8 + 127) & ~(uint64_t)127) + (uint64_t)tiles * ZS_FIXED);
        for (uint64_t i = (uint64_t)total + blockIdx.x * all + threadIdx.x; i < room; i += gridDim.x * all) lists[i] = Vec4{0, 0, 0, 0};
    }
}
