// SPDX-License-Identifier: Apache-2.0
// What clusters are for here: every block brings its share of what all of them read, by multicast copies, through a ring whose stages are handed back to all.
#include "emu/ptx_host.h"

#define STAGES 3
#define CONSUMERS 3  // warps

// x has `rounds` boxes of blocks * 8 rows of 64 columns; out gets, for each block, the sum of its words times what says where they stood.
template <uint32_t BLOCKS>
inline void cluster_ring(const uint16_t* x, uint32_t* out, uint32_t rounds) {
  ZS_SMEM(smem);
  constexpr uint32_t BOX = BLOCKS * 1024;
  const uint32_t base = smem_addr(smem), full = base + STAGES * BOX, empty = full + STAGES * 8, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (uint32_t s = 0; s < STAGES; s++) {
      mbarrier_init(full + 8 * s, 1);
      mbarrier_init(empty + 8 * s, BLOCKS * CONSUMERS);
    }
    fence_mbarrier_init();
  }
  cluster_arrive_relaxed();
  cluster_wait();
  uint32_t stage = 0, parity = 0;
  if (warp == CONSUMERS) {
    const TensorMap map{};
    if (lane == 0) {
      for (uint32_t r = 0; r < rounds; r++) {
        mbarrier_wait(empty + 8 * stage, parity ^ 1);
        mbarrier_arrive_expect_tx(full + 8 * stage, BOX);
        const uint32_t share = cluster_rank();
        tensor_copy_multicast(base + stage * BOX + share * 1024, map, TensorRows{x, 64, rounds * BLOCKS * 8, 64, 8}, 0, (r * BLOCKS + share) * 8, full + 8 * stage,
                                 (uint16_t)((1u << BLOCKS) - 1));
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
      if (BLOCKS == 4)  // one way to stay until the others have arrived for the last time
        for (uint32_t s = 0; s < STAGES; s++) {
          mbarrier_wait(empty + 8 * stage, parity ^ 1);
          if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    }
    __syncwarp();
  } else {
    uint32_t sum = 0;
    for (uint32_t r = 0; r < rounds; r++) {
      mbarrier_wait(full + 8 * stage, parity);
      for (uint32_t row = warp; row < BLOCKS * 8; row += CONSUMERS)
        sum += (row + 1) * (lane + 3) * ld_shared_u32(base + stage * BOX + row * 128 + ((lane / 4 ^ row % 8) << 4) + lane % 4 * 4);
      fence_proxy_async();  // a copy into the stage is not ordered behind these loads otherwise
      __syncwarp();
      if (lane < BLOCKS) mbarrier_arrive_cluster(empty + 8 * stage, lane);
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    sum = __reduce_add_sync(~0u, sum);
    if (lane == 0) atomicAdd(out + blockIdx.x, sum);
    __syncwarp();
  }
  if (BLOCKS == 2) cluster_sync();  // another way
}
extern "C" __global__ void cluster_ring2(const uint16_t* x, uint32_t* out, uint32_t rounds) { cluster_ring<2>(x, out, rounds); }
extern "C" __global__ void cluster_ring4(const uint16_t* x, uint32_t* out, uint32_t rounds) { cluster_ring<4>(x, out, rounds); }

// Two blocks make half of what both read, each, and copy it into the other's memory. out gets, for each block, the sum over all rounds.
extern "C" __global__ void block_exchange(uint32_t* out, uint32_t rounds) {
  ZS_SMEM(smem);
  const uint32_t base = smem_addr(smem), full = base + 2 * 1024, empty = full + 16, warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (uint32_t s = 0; s < 2; s++) {
      mbarrier_init(full + 8 * s, 1);
      mbarrier_init(empty + 8 * s, 2 * 2);
    }
    fence_mbarrier_init();
  }
  cluster_arrive_relaxed();
  cluster_wait();
  uint32_t sum = 0;
  for (uint32_t r = 0; r < rounds; r++) {
    const uint32_t stage = base + r % 2 * 1024, parity = r / 2 % 2, told = full + r % 2 * 8, free = empty + r % 2 * 8;
    if (warp == 0) {
      const uint32_t half = stage + rank * 512;
      if (r % 3 == 0)
        while (!mbarrier_test(free, parity ^ 1)) {
        }
      else
        mbarrier_wait(free, parity ^ 1);
      st_shared_v4(half + lane * 16, Vec4{rank + 1, r, lane, 7});
      fence_proxy_async();
      __syncwarp();
      if (lane == 0) {
        bulk_copy_to_block(half, half, 512, told, rank ^ 1);
        mbarrier_arrive_expect_tx(told, 512);  // the other's half
      }
    } else {
      mbarrier_wait(told, parity);
      const Vec4 v = ld_shared_v4(stage + (warp - 1) * 512 + lane * 16);
      sum += v.x * (v.y + 1) * (v.z + v.w);
      fence_proxy_async();
      __syncwarp();
      if (lane < 2) mbarrier_arrive_cluster(free, lane);
    }
  }
  if (warp > 0) atomicAdd(out + blockIdx.x, sum);
  __syncwarp();
  cluster_sync();
}

// What one block has written the next one reads, after a barrier to which the warps above the first do not come, because they have ended.
extern "C" __global__ void cluster_token(uint32_t* numbers, uint32_t* out) {
  if (threadIdx.x >= 32) return;
  for (uint32_t turn = 0; turn < 4; turn++) {
    if (threadIdx.x == 0 && cluster_rank() == turn) {
      uint32_t* const number = numbers + blockIdx.x / 4;
      out[blockIdx.x] = *number;
      *number = 10 * *number + turn;
    }
    __syncwarp();
    cluster_sync();
  }
}
