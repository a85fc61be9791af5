// SPDX-License-Identifier: Apache-2.0
// Small wrong kernels with copies to global memory, each with one mistake. store_test.go names the fault each must be caught with. data has 512 words, flag one.
#include "emu/ptx_host.h"

#define SHARED ZS_SMEM(smem); const uint32_t base = smem_addr(smem); (void)base
#define FULL (base + 2048)

// 128 threads write 512 bytes each time.
inline void fill(uint32_t at, uint32_t v) {
  st_shared_u32(at + 4 * threadIdx.x, v + threadIdx.x);
  fence_proxy_async();
  __syncthreads();
}
inline void own_barrier(uint32_t bar) {
  if (threadIdx.x == 0) {
    mbarrier_init(bar, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
}
inline void fetch(uint32_t base, const uint32_t* from) {
  mbarrier_arrive_expect_tx(FULL, 512);
  bulk_copy_g2s(base, from, 512, FULL);
}

extern "C" __global__ void store_without_proxy_fence(uint32_t* data, uint32_t*) {
  SHARED;
  st_shared_u32(base + 4 * threadIdx.x, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_copy_s2g(data, base, 512);
    bulk_copies_done<0>();
  }
}
extern "C" __global__ void store_without_barrier(uint32_t* data, uint32_t*) {
  SHARED;
  st_shared_u32(base + 4 * threadIdx.x, 1);
  fence_proxy_async();
  __syncwarp();
  if (threadIdx.x == 0) {
    bulk_copy_s2g(data, base, 512);
    bulk_copies_done<0>();
  }
}
extern "C" __global__ void store_of_nothing(uint32_t* data, uint32_t*) {
  SHARED;
  fill(base, 1);
  if (threadIdx.x == 0) {
    bulk_copy_s2g(data, base + 256, 512);
    bulk_copies_done<0>();
  }
}
extern "C" __global__ void source_written_while_read(uint32_t* data, uint32_t*) {
  SHARED;
  fill(base, 1);
  if (threadIdx.x == 0) bulk_copy_s2g(data, base, 512);
  __syncthreads();
  fill(base, 2);
  if (threadIdx.x == 0) bulk_copies_done<0>();
}
// Of two copies that read the same bytes the one is waited for.
extern "C" __global__ void source_of_the_other_copy(uint32_t* data, uint32_t*) {
  SHARED;
  fill(base, 1);
  if (threadIdx.x == 0) {
    bulk_copy_s2g(data, base, 512);
    bulk_copy_s2g(data + 128, base, 256);
    bulk_copies_done<1>();
  }
  __syncthreads();
  fill(base, 2);
  if (threadIdx.x == 0) bulk_copies_done<0>();
}
extern "C" __global__ void source_of_the_last_copy(uint32_t* data, uint32_t*) {
  SHARED;
  fill(base, 1);
  fill(base + 512, 1);
  if (threadIdx.x == 0) {
    bulk_copy_s2g(data, base, 512);
    bulk_copy_s2g(data + 128, base + 512, 512);
    bulk_copies_read<1>();
  }
  __syncthreads();
  fill(base, 2);
  fill(base + 512, 2);
  if (threadIdx.x == 0) bulk_copies_done<0>();
}
extern "C" __global__ void source_written_by_matrices(uint32_t* data, uint32_t*) {
  SHARED;
  fill(base, 1);
  if (threadIdx.x == 0) bulk_copy_s2g(data, base, 512);
  __syncthreads();
  if (threadIdx.x < 32) store_matrices_transposed(base + 16 * threadIdx.x, Vec4{0, 0, 0, 0});
  if (threadIdx.x == 0) bulk_copies_done<0>();
}
extern "C" __global__ void source_written_by_a_copy(uint32_t* data, uint32_t*) {
  SHARED;
  own_barrier(FULL);
  fill(base, 1);
  if (threadIdx.x == 0) {
    bulk_copy_s2g(data, base, 512);
    fetch(base, data + 256);
    bulk_copies_read();
  }
  mbarrier_wait(FULL, 0);
}
// Thread 0 knows that the source has been read; the others do not.
extern "C" __global__ void source_written_by_others(uint32_t* data, uint32_t*) {
  SHARED;
  fill(base, 1);
  if (threadIdx.x == 0) {
    bulk_copy_s2g(data, base, 512);
    bulk_copies_read();
  }
  named_barrier_sync(1, 128);
  if (threadIdx.x == 0) {
    bulk_copy_s2g(data + 128, base, 512);
    bulk_copies_read();
  }
  if (threadIdx.x >= 32) st_shared_u32(base + 4 * threadIdx.x, 2);
}
extern "C" __global__ void source_waited_for_by_another_thread(uint32_t* data, uint32_t*) {
  SHARED;
  fill(base, 1);
  if (threadIdx.x == 0) bulk_copy_s2g(data, base, 512);
  __syncthreads();
  if (threadIdx.x == 1) bulk_copies_read();   // of which it has none
  __syncthreads();
  fill(base, 2);
  if (threadIdx.x == 0) bulk_copies_done<0>();
}
extern "C" __global__ void ends_while_it_is_read(uint32_t* data, uint32_t*) {
  SHARED;
  fill(base, 1);
  if (threadIdx.x == 0) bulk_copy_s2g(data, base, 512);
}
extern "C" __global__ void read_is_not_done(uint32_t* data, uint32_t*) {
  SHARED;
  fill(base, 1);
  if (threadIdx.x == 0) {
    bulk_copy_s2g(data, base, 512);
    bulk_copies_read();
    data[128] = data[5];
  }
}
extern "C" __global__ void waits_for_too_few(uint32_t* data, uint32_t*) {
  SHARED;
  fill(base, 1);
  if (threadIdx.x == 0) {
    bulk_copy_s2g(data, base, 512);
    bulk_copy_s2g(data + 128, base, 512);
    bulk_copies_done<1>();
    data[256] = data[0];
    data[257] = data[128];
    bulk_copies_done<0>();
  }
}
extern "C" __global__ void waited_for_by_another_thread(uint32_t* data, uint32_t*) {
  SHARED;
  fill(base, 1);
  if (threadIdx.x == 0) bulk_copy_s2g(data, base, 512);
  __syncthreads();
  if (threadIdx.x == 1) {
    bulk_copies_done<0>();
    data[128] = data[0];
  }
  if (threadIdx.x == 0) bulk_copies_read();
}
extern "C" __global__ void read_before_the_barrier(uint32_t* data, uint32_t*) {
  SHARED;
  fill(base, 1);
  if (threadIdx.x == 0) {
    bulk_copy_s2g(data, base, 512);
    bulk_copies_done<0>();
  }
  if (threadIdx.x == 64) data[128] = data[0];
}
extern "C" __global__ void stores_over_each_other(uint32_t* data, uint32_t*) {
  SHARED;
  fill(base, 1);
  if (threadIdx.x == 0) {
    bulk_copy_s2g(data, base, 512);
    bulk_copy_s2g(data + 124, base, 512);
    bulk_copies_done<0>();
  }
}
extern "C" __global__ void store_over_a_reader(uint32_t* data, uint32_t*) {
  SHARED;
  fill(base, 1);
  if (threadIdx.x == 64) data[256] = data[0];
  if (threadIdx.x == 0) {
    bulk_copy_s2g(data, base, 512);
    bulk_copies_done<0>();
  }
}
extern "C" __global__ void store_over_plain_stores(uint32_t* data, uint32_t*) {
  SHARED;
  data[threadIdx.x] = 0;
  fence_proxy_async();   // of shared memory
  fill(base, 1);
  if (threadIdx.x == 0) {
    bulk_copy_s2g(data, base, 512);
    bulk_copies_done<0>();
  }
}
extern "C" __global__ void fetch_of_plain_stores(uint32_t* data, uint32_t*) {
  SHARED;
  own_barrier(FULL);
  data[threadIdx.x] = 0;
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) fetch(base, data);
  mbarrier_wait(FULL, 0);
}
extern "C" __global__ void store_misaligned(uint32_t* data, uint32_t*) {
  SHARED;
  fill(base, 1);
  if (threadIdx.x == 0) bulk_copy_s2g(data + 2, base, 256);
}
extern "C" __global__ void store_from_misaligned(uint32_t* data, uint32_t*) {
  SHARED;
  fill(base, 1);
  if (threadIdx.x == 0) bulk_copy_s2g(data, base + 8, 256);
}
extern "C" __global__ void store_beyond_end(uint32_t* data, uint32_t*) {
  SHARED;
  fill(base, 1);
  if (threadIdx.x == 0) bulk_copy_s2g(data + 448, base, 512);
}
extern "C" __global__ void store_of_some_bytes(uint32_t* data, uint32_t*) {
  SHARED;
  fill(base, 1);
  if (threadIdx.x == 0) bulk_copy_s2g(data, base, 8);
}
extern "C" __global__ void store_to_shared(uint32_t*, uint32_t*) {
  SHARED;
  fill(base, 1);
  if (threadIdx.x == 0) bulk_copy_s2g(smem + 1024, base, 512);
}
inline void box(uint32_t base) {
  st_shared_v4(base + 16 * threadIdx.x, Vec4{0, 0, 0, 0});
  fence_proxy_async();
  __syncthreads();
}
extern "C" __global__ void tensor_store_of_a_bad_matrix(uint32_t* data, uint32_t*) {
  SHARED;
  box(base);
  if (threadIdx.x == 0) tensor_store(TensorMap{}, TensorRows{(uint16_t*)data, 67, 8, 64, 8}, 0, 0, 0, base);
}
extern "C" __global__ void tensor_store_off_its_atom(uint32_t* data, uint32_t*) {
  SHARED;
  box(base);
  if (threadIdx.x == 0) tensor_store(TensorMap{}, TensorRows{(uint16_t*)data, 64, 8, 64, 8}, 0, 0, 0, base + 512);
}
extern "C" __global__ void tensor_store_beyond_end(uint32_t* data, uint32_t*) {
  SHARED;
  box(base);
  if (threadIdx.x == 0) tensor_store(TensorMap{}, TensorRows{(uint16_t*)data, 64, 100, 64, 8}, 0, 16, 0, base);
}
extern "C" __global__ void prefetch_beyond_end(uint32_t* data, uint32_t*) {
  if (threadIdx.x == 0) prefetch_l2(data + 448, 512);
}
extern "C" __global__ void prefetch_misaligned(uint32_t* data, uint32_t*) {
  if (threadIdx.x == 0) prefetch_l2(data + 1, 512);
}
extern "C" __global__ void matrices_misaligned(uint32_t*, uint32_t*) {
  SHARED;
  store_matrices_transposed(base + threadIdx.x / 32 * 512 + threadIdx.x % 32 * 16 + 4, Vec4{0, 0, 0, 0});
}
extern "C" __global__ void matrices_by_half_a_warp(uint32_t*, uint32_t*) {
  SHARED;
  if (threadIdx.x % 32 < 16) store_matrices_transposed(base + threadIdx.x * 16, Vec4{0, 0, 0, 0});
}
extern "C" __global__ void counts_too_many(uint32_t*, uint32_t*) {
  SHARED;
  if (threadIdx.x == 0) {
    mbarrier_init(base, 4);
    mbarrier_arrive(base, 5);
  }
}

// From here on block 0 sends and block 1 fetches.
#define SENDER (blockIdx.x == 0)
inline void wait_for(const uint32_t* flag) {
  while (ld_acquire_u32(flag) == 0) {
  }
}

extern "C" __global__ void told_before_done(uint32_t* data, uint32_t* flag) {
  SHARED;
  own_barrier(FULL);
  fill(base, 1);
  if (threadIdx.x) return;
  if (SENDER) {
    bulk_copy_s2g(data, base, 512);
    bulk_copies_read();
    fence_release();
    red_add_relaxed(flag, 1);
    bulk_copies_done<0>();
  } else {
    wait_for(flag);
    fence_proxy_async_global();
    fetch(base, data);
    mbarrier_wait(FULL, 0);
  }
}
extern "C" __global__ void told_without_release(uint32_t* data, uint32_t* flag) {
  SHARED;
  own_barrier(FULL);
  fill(base, 1);
  if (threadIdx.x) return;
  if (SENDER) {
    bulk_copy_s2g(data, base, 512);
    bulk_copies_done<0>();
    red_add_relaxed(flag, 1);
  } else {
    wait_for(flag);
    fence_proxy_async_global();
    fetch(base, data);
    mbarrier_wait(FULL, 0);
  }
}
extern "C" __global__ void released_before_done(uint32_t* data, uint32_t* flag) {
  SHARED;
  own_barrier(FULL);
  fill(base, 1);
  if (threadIdx.x) return;
  if (SENDER) {
    bulk_copy_s2g(data, base, 512);
    fence_release();
    bulk_copies_done<0>();
    red_add_relaxed(flag, 1);
  } else {
    wait_for(flag);
    fence_proxy_async_global();
    fetch(base, data);
    mbarrier_wait(FULL, 0);
  }
}
extern "C" __global__ void told_by_another_thread(uint32_t* data, uint32_t* flag) {
  SHARED;
  own_barrier(FULL);
  fill(base, 1);
  if (threadIdx.x > 1) return;
  if (SENDER) {
    if (threadIdx.x == 0) {
      bulk_copy_s2g(data, base, 512);
      bulk_copies_done<0>();
    } else {
      fence_release();
      red_add_relaxed(flag, 1);
    }
  } else if (threadIdx.x == 0) {
    wait_for(flag);
    fence_proxy_async_global();
    fetch(base, data);
    mbarrier_wait(FULL, 0);
  }
}
extern "C" __global__ void fetched_without_acquire(uint32_t* data, uint32_t* flag) {
  SHARED;
  own_barrier(FULL);
  fill(base, 1);
  if (threadIdx.x) return;
  if (SENDER) {
    bulk_copy_s2g(data, base, 512);
    bulk_copies_done<0>();
    fence_release();
    red_add_relaxed(flag, 1);
  } else {
    while (atomicAdd(flag, 0u) == 0) __nanosleep(20);
    fence_proxy_async_global();
    fetch(base, data);
    mbarrier_wait(FULL, 0);
  }
}
extern "C" __global__ void fetched_without_proxy_fence(uint32_t* data, uint32_t* flag) {
  SHARED;
  own_barrier(FULL);
  fill(base, 1);
  if (threadIdx.x) return;
  if (SENDER) {
    bulk_copy_s2g(data, base, 512);
    bulk_copies_done<0>();
    fence_proxy_async_global();   // it is the reader who must
    fence_release();
    red_add_relaxed(flag, 1);
  } else {
    wait_for(flag);
    fence_proxy_async();   // of shared memory
    fetch(base, data);
    mbarrier_wait(FULL, 0);
  }
}
extern "C" __global__ void proxy_fence_before_the_acquire(uint32_t* data, uint32_t* flag) {
  SHARED;
  own_barrier(FULL);
  fill(base, 1);
  if (threadIdx.x) return;
  if (SENDER) {
    bulk_copy_s2g(data, base, 512);
    bulk_copies_done<0>();
    fence_release();
    red_add_relaxed(flag, 1);
  } else {
    fence_proxy_async_global();
    wait_for(flag);
    fetch(base, data);
    mbarrier_wait(FULL, 0);
  }
}
// A vote tells lane 0 what lane 1 has seen, but is no fence.
extern "C" __global__ void acquired_by_another_lane(uint32_t* data, uint32_t* flag) {
  SHARED;
  own_barrier(FULL);
  fill(base, 1);
  if (threadIdx.x >= 32) return;
  if (SENDER) {
    if (threadIdx.x) return;
    bulk_copy_s2g(data, base, 512);
    bulk_copies_done<0>();
    fence_release();
    red_add_relaxed(flag, 1);
  } else {
    while (!__any_sync(~0u, threadIdx.x == 1 && ld_acquire_u32(flag) != 0)) {
    }
    if (threadIdx.x) return;
    fence_proxy_async_global();
    fetch(base, data);
    mbarrier_wait(FULL, 0);
  }
}
extern "C" __global__ void store_before_griddep_wait(uint32_t* data, uint32_t*) {
  SHARED;
  fill(base, 1);
  if (threadIdx.x == 0) {
    bulk_copy_s2g(data, base, 512);
    griddep_wait();
    bulk_copies_done<0>();
  }
}
