// SPDX-License-Identifier: Apache-2.0
// Small wrong kernels, each with one mistake that a GPU may well let pass. emu_test.go names the fault each must be caught with.
#include "emu/ptx_host.h"

#define LANE (threadIdx.x % 32)
#define SHARED ZS_SMEM(smem); const uint32_t base = smem_addr(smem); (void)base

inline void one_barrier(uint32_t bar, uint32_t count) {
  if (threadIdx.x == 0) {
    mbarrier_init(bar, count);
    fence_mbarrier_init();
  }
  __syncthreads();
}

extern "C" __global__ void bulk_without_wait(const uint32_t* in, uint32_t* out) {
  SHARED;
  one_barrier(base + 512, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(base + 512, 512);
    bulk_copy_g2s(base, in, 512, base + 512);
  }
  __syncthreads();
  out[threadIdx.x] = ld_shared_u32(base + 4 * threadIdx.x);
  mbarrier_wait(base + 512, 0);
}

extern "C" __global__ void bulk_wrong_parity(const uint32_t* in, uint32_t* out) {
  SHARED;
  one_barrier(base + 512, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(base + 512, 512);
    bulk_copy_g2s(base, in, 512, base + 512);
  }
  mbarrier_wait(base + 512, 1);   // true at once: the phase before the first
  out[threadIdx.x] = ld_shared_u32(base + 4 * threadIdx.x);
}

extern "C" __global__ void bulk_too_few_bytes(const uint32_t* in, uint32_t* out) {
  SHARED;
  one_barrier(base + 512, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(base + 512, 256);
    bulk_copy_g2s(base, in, 512, base + 512);
  }
  mbarrier_wait(base + 512, 0);
  out[threadIdx.x] = ld_shared_u32(base + 4 * threadIdx.x);
}

extern "C" __global__ void bulk_too_many_bytes(const uint32_t* in, uint32_t* out) {
  SHARED;
  one_barrier(base + 512, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(base + 512, 1024);
    bulk_copy_g2s(base, in, 512, base + 512);
  }
  mbarrier_wait(base + 512, 0);
  out[threadIdx.x] = ld_shared_u32(base + 4 * threadIdx.x);
}

extern "C" __global__ void bulk_over_readers(const uint32_t* in, uint32_t* out) {
  SHARED;
  one_barrier(base + 512, 1);
  for (uint32_t round = 0; round < 2; round++) {
    if (threadIdx.x == 0) {   // nobody said that the first round has been read
      mbarrier_arrive_expect_tx(base + 512, 512);
      bulk_copy_g2s(base, in + round * 128, 512, base + 512);
    }
    mbarrier_wait(base + 512, round);
    out[round * 128 + threadIdx.x] = ld_shared_u32(base + 4 * threadIdx.x);
    fence_proxy_async();
  }
}

// All have read, by ordinary loads, and met: no fence between these and the next copy, or one before the loads, or of a thread that had not heard of all of them.
inline void over_loads(uint32_t base, const uint32_t* in, uint32_t* out, int fence) {
  one_barrier(base + 512, 1);
  for (uint32_t round = 0; round < 2; round++) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect_tx(base + 512, 512);
      bulk_copy_g2s(base, in + round * 128, 512, base + 512);
    }
    mbarrier_wait(base + 512, round);
    if (fence == 1) fence_proxy_async();
    out[round * 128 + threadIdx.x] = ld_shared_u32(base + 4 * threadIdx.x);
    if (fence == 2 && threadIdx.x == 0) fence_proxy_async();
    __syncthreads();
  }
}
extern "C" __global__ void bulk_over_loads(const uint32_t* in, uint32_t* out) {
  SHARED;
  over_loads(base, in, out, 0);
}
extern "C" __global__ void bulk_over_loads_after_a_fence(const uint32_t* in, uint32_t* out) {
  SHARED;
  over_loads(base, in, out, 1);
}
extern "C" __global__ void bulk_over_loads_of_others(const uint32_t* in, uint32_t* out) {
  SHARED;
  over_loads(base, in, out, 2);
}
// The same within a warp.
extern "C" __global__ void bulk_over_loads_of_the_warp(const uint32_t* in, uint32_t* out) {
  SHARED;
  one_barrier(base + 512, 1);
  for (uint32_t round = 0; round < 2 && threadIdx.x < 32; round++) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect_tx(base + 512, 512);
      bulk_copy_g2s(base, in + round * 128, 512, base + 512);
    }
    mbarrier_wait(base + 512, round);
    st_global_v4(out + 4 * threadIdx.x, ld_shared_v4(base + 16 * threadIdx.x));
    __syncwarp();
  }
}

extern "C" __global__ void bulk_without_init_fence(const uint32_t* in, uint32_t* out) {
  SHARED;
  if (threadIdx.x == 0) mbarrier_init(base + 512, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(base + 512, 512);
    bulk_copy_g2s(base, in, 512, base + 512);
  }
  mbarrier_wait(base + 512, 0);
  out[threadIdx.x] = ld_shared_u32(base + 4 * threadIdx.x);
}

extern "C" __global__ void bulk_over_stores(const uint32_t* in, uint32_t* out) {
  SHARED;
  st_shared_u32(base + 4 * threadIdx.x, 0);   // cleared by ordinary stores, with no proxy fence
  one_barrier(base + 512, 1);
  if (threadIdx.x == 32) {
    mbarrier_arrive_expect_tx(base + 512, 512);
    bulk_copy_g2s(base, in, 512, base + 512);
  }
  mbarrier_wait(base + 512, 0);
  out[threadIdx.x] = ld_shared_u32(base + 4 * threadIdx.x);
}

extern "C" __global__ void mbarrier_without_barrier(const uint32_t*, uint32_t* out) {
  SHARED;
  if (threadIdx.x == 0) mbarrier_init(base, 128);
  __syncwarp();
  mbarrier_arrive(base);
  mbarrier_wait(base, 0);
  out[threadIdx.x] = 1;
}

extern "C" __global__ void mbarrier_arrives_twice(const uint32_t*, uint32_t* out) {
  SHARED;
  one_barrier(base, 100);
  mbarrier_arrive(base);   // 128 threads; the next phase sees 28 of them
  mbarrier_wait(base, 0);
  mbarrier_wait(base, 1);
  out[threadIdx.x] = 1;
}

extern "C" __global__ void cp_async_without_wait(const uint32_t* in, uint32_t* out) {
  SHARED;
  cp_async_16(base + 16 * threadIdx.x, in + 4 * (threadIdx.x % 32));
  cp_async_commit();
  cp_async_wait<1>();   // lets the one group be under way
  __syncthreads();
  out[threadIdx.x] = ld_shared_u32(base + 16 * threadIdx.x);
}

extern "C" __global__ void cp_async_without_barrier(const uint32_t* in, uint32_t* out) {
  SHARED;
  cp_async_16(base + 16 * threadIdx.x, in + 4 * (threadIdx.x % 32));
  cp_async_commit();
  cp_async_wait<0>();   // waits for its own copies only
  out[threadIdx.x] = ld_shared_u32(base + 16 * (threadIdx.x ^ 1));
}

extern "C" __global__ void missing_syncthreads(const uint32_t*, uint32_t* out) {
  SHARED;
  st_shared_u32(base + 4 * threadIdx.x, threadIdx.x);
  __syncwarp();
  out[threadIdx.x] = ld_shared_u32(base + 4 * (threadIdx.x ^ 32));
}

extern "C" __global__ void missing_syncwarp(const uint32_t*, uint32_t* out) {
  SHARED;
  st_shared_u32(base + 4 * threadIdx.x, threadIdx.x);
  out[threadIdx.x] = ld_shared_u32(base + 4 * (threadIdx.x ^ 1));
}

extern "C" __global__ void shuffle_is_no_fence(const uint32_t*, uint32_t* out) {
  SHARED;
  st_shared_u32(base + 4 * threadIdx.x, threadIdx.x);
  (void)__shfl_sync(~0u, 0, 0);
  out[threadIdx.x] = ld_shared_u32(base + 4 * (threadIdx.x ^ 1));
}

extern "C" __global__ void overwrites_while_read(const uint32_t*, uint32_t* out) {
  SHARED;
  st_shared_u32(base + 4 * threadIdx.x, threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = ld_shared_u32(base + 4 * (threadIdx.x ^ 64));
  st_shared_u32(base + 4 * threadIdx.x, 0);
}

extern "C" __global__ void unequal_barriers(const uint32_t*, uint32_t* out) {
  if (threadIdx.x < 96) __syncthreads();
  out[threadIdx.x] = 1;
}

extern "C" __global__ void barrier_of_two_sizes(const uint32_t*, uint32_t* out) {
  named_barrier_sync(1, threadIdx.x < 64 ? 64 : 128);
  out[threadIdx.x] = 1;
}

extern "C" __global__ void divergent_shuffle(const uint32_t*, uint32_t* out) {
  uint32_t v = LANE;
  if (LANE < 16) v = __shfl_sync(~0u, v, 3);
  else v = __reduce_add_sync(~0u, v);
  out[threadIdx.x] = v;
}

extern "C" __global__ void shuffle_without_lanes(const uint32_t*, uint32_t* out) {
  uint32_t v = LANE;
  if (LANE < 16) {
    v = __shfl_sync(~0u, v, 3);
    out[threadIdx.x] = v;
    return;
  }
  __syncthreads();
}

extern "C" __global__ void mma_after_return(const uint32_t*, uint32_t* out) {
  if (LANE == 31) return;
  float d[4] = {0, 0, 0, 0};
  const uint32_t a[4] = {0, 0, 0, 0};
  mma_m16n8k16_bf16(d, a, 0, 0);
  out[threadIdx.x] = __float_as_uint(d[0]);
}

extern "C" __global__ void global_beyond_end(const uint32_t* in, uint32_t* out) { out[threadIdx.x] = in[threadIdx.x * 2 + 2]; }
extern "C" __global__ void global_before_start(const uint32_t* in, uint32_t* out) { out[threadIdx.x] = in[(int)threadIdx.x - 1]; }
extern "C" __global__ void writes_input(const uint32_t* in, uint32_t* out) {
  out[threadIdx.x] = 0;
  ((uint32_t*)in)[threadIdx.x] = 1;
}
extern "C" __global__ void shared_beyond_end(const uint32_t*, uint32_t* out) {
  SHARED;
  st_shared_u32(base + 4096 - 4 * 127 + 4 * threadIdx.x, 1);
  out[threadIdx.x] = 1;
}
extern "C" __global__ void misaligned_vector(const uint32_t* in, uint32_t* out) { out[threadIdx.x] = ld_global_v4(in + threadIdx.x / 2).x; }
extern "C" __global__ void misaligned_plain(const uint32_t* in, uint32_t* out) { out[threadIdx.x] = *(const uint32_t*)((const char*)in + 2); }
extern "C" __global__ void never_written(const uint32_t*, uint32_t* out) {
  SHARED;
  out[threadIdx.x] = ld_shared_u32(base + 4 * threadIdx.x);
}

inline void wgmma_operands(uint32_t base) {
  for (uint32_t i = threadIdx.x; i < 768; i += 128) st_shared_v4(base + 16 * i, Vec4{0, 0, 0, 0});
}
#define LAYOUT ((uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62)

extern "C" __global__ void wgmma_without_proxy_fence(const uint32_t*, uint32_t* out) {
  SHARED;
  wgmma_operands(base);
  __syncthreads();
  float acc[4] = {0, 0, 0, 0};
  wgmma_fence();
  wgmma_m64k16_bf16<8>(acc, LAYOUT | base >> 4, LAYOUT | (base + 8192) >> 4);
  wgmma_commit();
  wgmma_wait<0>();
  out[threadIdx.x] = __float_as_uint(acc[0]);
}

extern "C" __global__ void wgmma_operand_reused_early(const uint32_t*, uint32_t* out) {
  SHARED;
  wgmma_operands(base);
  fence_proxy_async();
  __syncthreads();
  float acc[4] = {0, 0, 0, 0};
  wgmma_fence();
  wgmma_m64k16_bf16<8>(acc, LAYOUT | base >> 4, LAYOUT | (base + 8192) >> 4);
  wgmma_commit();
  __syncthreads();
  wgmma_operands(base);   // the next tile, before the wait
  fence_proxy_async();
  wgmma_wait<0>();
  out[threadIdx.x] = __float_as_uint(acc[0]);
}

extern "C" __global__ void wgmma_without_fence(const uint32_t*, uint32_t* out) {
  SHARED;
  wgmma_operands(base);
  fence_proxy_async();
  __syncthreads();
  float acc[4] = {0, 0, 0, 0};
  wgmma_m64k16_bf16<8>(acc, LAYOUT | base >> 4, LAYOUT | (base + 8192) >> 4);
  wgmma_commit();
  wgmma_wait<0>();
  out[threadIdx.x] = __float_as_uint(acc[0]);
}

// Block 1 reads what block 0 wrote.
extern "C" __global__ void flag_without_release(uint32_t* data, uint32_t* flag) {
  if (threadIdx.x) return;
  if (blockIdx.x == 0) {
    data[0] = 7;
    atomicExch(flag, 1u);   // relaxed, and no fence before it
  } else {
    while (ld_acquire_u32(flag) == 0) {
    }
    data[1] = data[0];
  }
}
extern "C" __global__ void flag_without_acquire(uint32_t* data, uint32_t* flag) {
  if (threadIdx.x) return;
  if (blockIdx.x == 0) {
    data[0] = 7;
    st_release_u32(flag, 1);
  } else {
    while (atomicAdd(flag, 0u) == 0) __nanosleep(20);
    data[1] = data[0];   // no __threadfence since
  }
}
extern "C" __global__ void flag_never_set(uint32_t* data, uint32_t* flag) {
  if (threadIdx.x) return;
  while (ld_acquire_u32(flag) == 0) {
  }
  data[0] = 1;
}
// The lanes look for it together.
extern "C" __global__ void flag_never_set_for_a_warp(uint32_t* data, uint32_t* flag) {
  if (threadIdx.x >= 32) return;
  while (!__any_sync(~0u, threadIdx.x % 2 && ld_acquire_u32(flag) != 0)) {
  }
  data[0] = 1;
}
extern "C" __global__ void no_griddep_wait(uint32_t* data, uint32_t* flag) {
  if (threadIdx.x == 0 && blockIdx.x == 0) flag[0] = data[0];
  griddep_wait();
}
extern "C" __global__ void endless(const uint32_t* in, uint32_t*) {
  while (__ldg(in) != 1) __syncwarp();
}
