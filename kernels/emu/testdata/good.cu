// SPDX-License-Identifier: Apache-2.0
// Small correct kernels, one for each thing that the emulator emulates. emu_test.go knows what they must compute.
#include "emu/ptx_host.h"

extern "C" __global__ void warp_functions(uint32_t* out) {
  const uint32_t lane = threadIdx.x % 32;
  uint32_t* o = out + lane * 16;
  o[0] = __shfl_sync(~0u, lane * 3, 5);
  o[1] = __shfl_up_sync(~0u, lane, 3);
  o[2] = __shfl_down_sync(~0u, lane, 3, 16);
  o[3] = __shfl_xor_sync(~0u, lane, 9);
  o[4] = __ballot_sync(~0u, lane % 3 == 0);
  o[5] = __match_any_sync(~0u, lane % 5);
  o[6] = __reduce_add_sync(~0u, lane);
  o[7] = __reduce_max_sync(~0u, lane ^ 21u);
  o[8] = (uint32_t)__any_sync(~0u, lane == 7);
  o[9] = (uint32_t)__all_sync(~0u, lane < 32);
  // Two groups of lanes at once, each with its own mask.
  const uint32_t half = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  o[10] = __reduce_add_sync(half, lane);
  __syncwarp(half);
  // Only some lanes take part.
  o[11] = 0;
  if (lane % 2) o[11] = __shfl_sync(0xAAAAAAAAu, lane, 31);
  o[12] = __byte_perm(0x33221100u, 0x77665544u, 0x5140u + lane % 4);
  o[13] = (uint32_t)__ffs((int)(lane << 4)) << 16 | (uint32_t)__clz((int)lane) << 8 | (uint32_t)__popc(lane);
  o[14] = __float_as_uint(__shfl_sync(~0u, 0.5f * lane, 8));
  o[15] = __reduce_xor_sync(~0u, lane * lane);
}

// A producer warp streams chunks of 512 bytes through a ring of mbarriers; three consumer warps add them up.
template <int STAGES>
inline void bulk_ring(const uint32_t* in, uint32_t* out, uint32_t chunks) {
  ZS_SMEM(smem);
  const uint32_t base = smem_addr(smem), full = base + STAGES * 512, empty = full + STAGES * 8, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (uint32_t s = 0; s < STAGES; s++) {
      mbarrier_init(full + 8 * s, 1);
      mbarrier_init(empty + 8 * s, 3);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  uint32_t stage = 0, parity = 0;
  if (warp == 3) {
    if (lane == 0)
      for (uint32_t c = 0; c < chunks; c++) {
        mbarrier_wait(empty + 8 * stage, parity ^ 1);
        mbarrier_arrive_expect_tx(full + 8 * stage, 512);
        bulk_copy_g2s(base + stage * 512, in + c * 128, 512, full + 8 * stage);
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
    return;
  }
  uint32_t sum = 0;
  for (uint32_t c = 0; c < chunks; c++) {
    mbarrier_wait(full + 8 * stage, parity);
    if (c % 3 == warp)
      for (uint32_t i = 0; i < 4; i++) sum += ld_shared_u32(base + stage * 512 + i * 128 + lane * 4);
    fence_proxy_async();   // the next copy into the stage is not ordered behind these loads otherwise
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty + 8 * stage);
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
  sum = __reduce_add_sync(~0u, sum);
  if (lane == 0) atomicAdd(out, sum);
}
extern "C" __global__ void bulk_ring2(const uint32_t* in, uint32_t* out, uint32_t chunks) { bulk_ring<2>(in, out, chunks); }
extern "C" __global__ void bulk_ring5(const uint32_t* in, uint32_t* out, uint32_t chunks) { bulk_ring<5>(in, out, chunks); }

// Each round's copy goes over what the one before it was read from: behind a fence of every reader, or of the thread that copies, once it has heard of them all.
template <bool COPIER>
inline void over_loads(const uint32_t* in, uint32_t* out, uint32_t rounds) {
  ZS_SMEM(smem);
  const uint32_t base = smem_addr(smem), full = base + 512;
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  uint32_t sum = 0;
  for (uint32_t r = 0; r < rounds; r++) {
    if (threadIdx.x == 0) {
      if (COPIER) fence_proxy_async();
      mbarrier_arrive_expect_tx(full, 512);
      bulk_copy_g2s(base, in + r * 128, 512, full);
    }
    mbarrier_wait(full, r & 1);
    sum += ld_shared_u32(base + 4 * threadIdx.x);
    if (!COPIER) fence_proxy_async();
    __syncthreads();
  }
  atomicAdd(out, sum);
}
extern "C" __global__ void over_loads_of_readers(const uint32_t* in, uint32_t* out, uint32_t rounds) { over_loads<false>(in, out, rounds); }
extern "C" __global__ void over_loads_by_copier(const uint32_t* in, uint32_t* out, uint32_t rounds) { over_loads<true>(in, out, rounds); }

// cp.async groups, three deep; each thread reads what its neighbour copied.
extern "C" __global__ void cp_async_groups(const uint32_t* in, uint32_t* out, uint32_t rounds) {
  ZS_SMEM(smem);
  const uint32_t base = smem_addr(smem), t = threadIdx.x, row = blockDim.x * 16;
  for (uint32_t r = 0; r < 3; r++) {
    if (r < rounds) cp_async_16(base + r * row + t * 16, in + (r * blockDim.x + t) * 4);
    cp_async_commit();
  }
  uint32_t sum = 0;
  for (uint32_t r = 0; r < rounds; r++) {
    cp_async_wait<2>();
    __syncthreads();
    sum += (r + 1) * ld_shared_u32(base + r % 3 * row + (t + 1) % blockDim.x * 16 + 4);
    __syncthreads();
    if (r + 3 < rounds) cp_async_16(base + r % 3 * row + t * 16, in + ((r + 3) * blockDim.x + t) * 4);
    cp_async_commit();
  }
  out[t] = sum;
}

// cp.async that arrives at an mbarrier, with zero fill.
extern "C" __global__ void cp_async_arrive(const uint32_t* in, uint32_t* out, uint32_t bytes) {
  ZS_SMEM(smem);
  const uint32_t base = smem_addr(smem), bar = base + 32 * 16, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) mbarrier_init(bar, 32);
  __syncthreads();
  if (threadIdx.x < 32) {
    cp_async_16_zfill(base + lane * 16, in + lane * 4, min(16u, bytes > lane * 16 ? bytes - lane * 16 : 0u));
    cp_async_mbarrier_arrive(bar);
  } else {
    mbarrier_wait(bar, 0);
    const Vec4 v = ld_shared_v4(base + (31 - lane) * 16);
    st_global_v4(out + lane * 4, v);
  }
}

// d[16x8] = a[16x16] * b[8x16]^T from shared memory through ldmatrix.
extern "C" __global__ void mma_tile(const uint16_t* a, const uint16_t* b, float* d) {
  ZS_SMEM(smem);
  const uint32_t base = smem_addr(smem), lane = threadIdx.x;
  for (uint32_t i = lane; i < 256; i += 32) st_shared_u16(base + 2 * i, a[i]);
  for (uint32_t i = lane; i < 128; i += 32) st_shared_u16(base + 512 + 2 * i, b[i]);
  __syncwarp();
  uint32_t fa[4], fb[2];
  ldmatrix_x4(fa, base + lane % 16 * 32 + lane / 16 * 16);
  ldmatrix_x2(fb, base + 512 + lane % 8 * 32 + lane / 8 % 2 * 16);
  float acc[4] = {0, 0, 0, 0};
  mma_m16n8k16_bf16(acc, fa, fb[0], fb[1]);
  for (uint32_t i = 0; i < 4; i++) d[(lane / 4 + 8 * (i / 2)) * 8 + lane % 4 * 2 + i % 2] = acc[i];
}

// d[64x16] = a[64x64] * b[16x64]^T by one warpgroup, operands in the 128-byte swizzle, by descriptors.
extern "C" __global__ void wgmma_tile(const uint16_t* a, const uint16_t* b, float* d) {
  ZS_SMEM(smem);
  const uint32_t base = smem_addr(smem), t = threadIdx.x;
  for (uint32_t i = t; i < 80 * 64; i += 128) {
    const uint32_t row = i / 64, col = i % 64;
    st_shared_u16(base + row * 128 + ((col / 8 ^ row % 8) << 4) + col % 8 * 2, row < 64 ? a[i] : b[i - 4096]);
  }
  fence_proxy_async();
  __syncthreads();
  const uint64_t layout = (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
  float acc[8] = {1, 1, 1, 1, 1, 1, 1, 1};
  wgmma_fence();
  for (uint32_t j = 0; j < 4; j++) wgmma_m64k16_bf16<16>(acc, layout | (base + 32 * j) >> 4, layout | (base + 8192 + 32 * j) >> 4);
  wgmma_commit();
  wgmma_wait<0>();
  const uint32_t warp = t / 32, lane = t % 32;
  for (uint32_t i = 0; i < 8; i++) d[(warp * 16 + lane / 4 + 8 * (i / 2 % 2)) * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2] = acc[i];
}

// The last block to finish adds up what all blocks wrote.
extern "C" __global__ void last_block(const uint32_t* in, uint32_t* partial, uint32_t* count, uint32_t* out) {
  ZS_SMEM(smem);
  auto* last = (uint32_t*)smem;
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  partial[i] = in[i] * 3;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *last = atomicAdd(count, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!*last) return;
  for (uint32_t b = 0; b < gridDim.x; b++) atomicAdd(out, partial[b * blockDim.x + threadIdx.x]);
}

// Each block waits for the one before it: all must be alive at once, or be started in turn.
extern "C" __global__ void chain(uint32_t* flags, uint32_t* out) {
  if (threadIdx.x == 0) {
    uint32_t before = 0;
    if (blockIdx.x > 0)
      while ((before = ld_acquire_u32(flags + blockIdx.x - 1)) == 0) {
      }
    out[blockIdx.x] = blockIdx.x ? out[blockIdx.x - 1] + before : 1;
    st_release_u32(flags + blockIdx.x, blockIdx.x + 1);
  }
}

// Two named barriers between two pairs of warps, one of them with arrivals that do not wait; a counting block barrier.
extern "C" __global__ void barriers(uint32_t* out) {
  ZS_SMEM(smem);
  const uint32_t base = smem_addr(smem), t = threadIdx.x, warp = t / 32;
  for (uint32_t round = 0; round < 3; round++) {
    if (warp < 2) {
      st_shared_u32(base + 4 * t, t + round);
      named_barrier_arrive(1, 128);
      named_barrier_sync(2, 128);
    } else {
      named_barrier_sync(1, 128);
      out[round * 64 + t - 64] = ld_shared_u32(base + 4 * (t - 64));
      named_barrier_arrive(2, 128);
    }
  }
  out[192 + t] = (uint32_t)__syncthreads_count(t % 5 == 0);
}
