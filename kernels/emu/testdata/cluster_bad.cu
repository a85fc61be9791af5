// SPDX-License-Identifier: Apache-2.0
// Small wrong kernels for clusters of two blocks, each with one mistake. cluster_test.go names the fault each must be caught with.
#include "emu/ptx_host.h"

#define SHARED ZS_SMEM(smem); const uint32_t base = smem_addr(smem); (void)base
#define PEER (cluster_rank() ^ 1)

inline void own_barrier(uint32_t bar, uint32_t count) {
  if (threadIdx.x == 0) {
    mbarrier_init(bar, count);
    fence_mbarrier_init();
  }
}
inline void multicast(const uint32_t* in, uint32_t dst, uint32_t round, uint32_t bar, uint16_t mask) {
  tensor_copy_multicast(dst, TensorMap{}, TensorRows{(const uint16_t*)in, 64, 16, 64, 8}, 0, round * 8, bar, mask);
}

extern "C" __global__ void arrives_before_cluster_sync(const uint32_t*, uint32_t* out) {
  SHARED;
  own_barrier(base, 1);
  __syncthreads();   // says nothing of the other block's barrier
  if (threadIdx.x == 0) mbarrier_arrive_cluster(base, PEER);
  mbarrier_wait(base, 0);
  cluster_sync();
  out[blockIdx.x * 64 + threadIdx.x] = 1;
}

extern "C" __global__ void copies_before_cluster_sync(const uint32_t* in, uint32_t* out) {
  SHARED;
  own_barrier(base + 1024, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(base + 1024, 1024);
    if (cluster_rank() == 0) multicast(in, base, 0, base + 1024, 3);
  }
  mbarrier_wait(base + 1024, 0);
  cluster_sync();
  out[blockIdx.x * 64 + threadIdx.x] = ld_shared_u32(base + 4 * threadIdx.x);
}

// Two rounds through one stage, of which the sender asks only its own block whether it is free.
extern "C" __global__ void copies_over_readers_of_the_peer(const uint32_t* in, uint32_t* out) {
  SHARED;
  const uint32_t full = base + 1024, empty = full + 8;
  own_barrier(full, 1);
  own_barrier(empty, 64);
  cluster_sync();
  for (uint32_t round = 0; round < 2; round++) {
    if (threadIdx.x == 0) {
      mbarrier_wait(empty, round ^ 1);
      mbarrier_arrive_expect_tx(full, 1024);
      if (cluster_rank() == 0) multicast(in, base, round, full, 3);
    }
    __syncwarp();
    mbarrier_wait(full, round);
    out[blockIdx.x * 64 + threadIdx.x] = ld_shared_u32(base + 4 * threadIdx.x);
    fence_proxy_async();
    mbarrier_arrive(empty);
  }
  cluster_sync();
}

extern "C" __global__ void copy_without_the_peers_wait(const uint32_t* in, uint32_t* out) {
  SHARED;
  own_barrier(base + 1024, 1);
  cluster_sync();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(base + 1024, 1024);
    if (cluster_rank() == 0) multicast(in, base, 0, base + 1024, 3);
  }
  __syncwarp();
  if (cluster_rank() == 0) mbarrier_wait(base + 1024, 0);
  cluster_sync();   // orders threads, not what the copy engine does
  out[blockIdx.x * 64 + threadIdx.x] = ld_shared_u32(base + 4 * threadIdx.x);
}

extern "C" __global__ void copy_that_the_peer_does_not_expect(const uint32_t* in, uint32_t* out) {
  SHARED;
  own_barrier(base + 1024, 1);
  cluster_sync();
  if (threadIdx.x == 0) {
    if (cluster_rank() == 0) {
      mbarrier_arrive_expect_tx(base + 1024, 1024);
      multicast(in, base, 0, base + 1024, 3);
    } else {
      mbarrier_arrive(base + 1024);
    }
  }
  __syncwarp();
  mbarrier_wait(base + 1024, 0);
  out[blockIdx.x * 64 + threadIdx.x] = ld_shared_u32(base + 4 * threadIdx.x);
  cluster_sync();
}

extern "C" __global__ void copy_without_init_fence(const uint32_t* in, uint32_t* out) {
  SHARED;
  if (threadIdx.x == 0) {
    mbarrier_init(base + 1024, 1);
    if (cluster_rank() == 0) fence_mbarrier_init();
  }
  cluster_sync();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(base + 1024, 1024);
    if (cluster_rank() == 0) multicast(in, base, 0, base + 1024, 3);
  }
  __syncwarp();
  mbarrier_wait(base + 1024, 0);
  out[blockIdx.x * 64 + threadIdx.x] = ld_shared_u32(base + 4 * threadIdx.x);
  cluster_sync();
}

extern "C" __global__ void copy_beyond_the_cluster(const uint32_t* in, uint32_t* out) {
  SHARED;
  own_barrier(base + 1024, 1);
  cluster_sync();
  if (threadIdx.x == 0 && cluster_rank() == 0) {
    mbarrier_arrive_expect_tx(base + 1024, 1024);
    multicast(in, base, 0, base + 1024, 7);
  }
  cluster_sync();
  out[blockIdx.x * 64 + threadIdx.x] = 1;
}

extern "C" __global__ void ends_before_the_peers_arrival(const uint32_t*, uint32_t* out) {
  SHARED;
  own_barrier(base, 1);
  cluster_sync();
  if (threadIdx.x == 0) mbarrier_arrive_cluster(base, PEER);
  if (cluster_rank() == 0) mbarrier_wait(base, 0);   // the other block does not wait for its own
  out[blockIdx.x * 64 + threadIdx.x] = 1;
}

extern "C" __global__ void ends_before_the_peers_copy(const uint32_t* in, uint32_t* out) {
  SHARED;
  own_barrier(base + 1024, 1);
  cluster_sync();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(base + 1024, 1024);
    if (cluster_rank() == 0) multicast(in, base, 0, base + 1024, 3);
  }
  __syncwarp();
  if (cluster_rank() == 0) mbarrier_wait(base + 1024, 0);
  out[blockIdx.x * 64 + threadIdx.x] = 1;
}

extern "C" __global__ void arrives_once_too_often(const uint32_t*, uint32_t* out) {
  SHARED;
  own_barrier(base, 2);
  cluster_sync();
  if (threadIdx.x < 3) mbarrier_arrive_cluster(base, PEER);
  __syncwarp();
  mbarrier_wait(base, 0);
  mbarrier_wait(base, 1);
  out[blockIdx.x * 64 + threadIdx.x] = 1;
  cluster_sync();
}

extern "C" __global__ void arrives_beyond_the_cluster(const uint32_t*, uint32_t* out) {
  SHARED;
  own_barrier(base, 1);
  cluster_sync();
  if (threadIdx.x == 0) mbarrier_arrive_cluster(base, 2);
  out[blockIdx.x * 64 + threadIdx.x] = 1;
}

extern "C" __global__ void warp_that_does_not_come(const uint32_t*, uint32_t* out) {
  if (cluster_rank() == 1 && threadIdx.x >= 32) __syncthreads();
  else cluster_sync();
  out[blockIdx.x * 64 + threadIdx.x] = 1;
}

extern "C" __global__ void half_a_warp_syncs(const uint32_t*, uint32_t* out) {
  if (threadIdx.x % 32 < 16) cluster_sync();
  else __syncwarp();
  out[blockIdx.x * 64 + threadIdx.x] = 1;
}

extern "C" __global__ void reads_what_the_peer_wrote(const uint32_t*, uint32_t* out) {
  out[blockIdx.x * 64 + threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = out[PEER * 64 + threadIdx.x];
}

extern "C" __global__ void relaxed_barrier_publishes_nothing(const uint32_t*, uint32_t* out) {
  out[blockIdx.x * 64 + threadIdx.x] = threadIdx.x;
  cluster_arrive_relaxed();
  cluster_wait();
  out[blockIdx.x * 64 + threadIdx.x] = out[PEER * 64 + threadIdx.x];
}

extern "C" __global__ void relaxed_barrier_without_init_fence(const uint32_t*, uint32_t* out) {
  SHARED;
  if (threadIdx.x == 0) mbarrier_init(base, 1);
  __syncthreads();
  cluster_arrive_relaxed();
  cluster_wait();
  if (threadIdx.x == 0) mbarrier_arrive_cluster(base, PEER);
  __syncwarp();
  mbarrier_wait(base, 0);
  out[blockIdx.x * 64 + threadIdx.x] = 1;
}

extern "C" __global__ void arrival_publishes_nothing(const uint32_t*, uint32_t* out) {
  SHARED;
  own_barrier(base, 64);
  cluster_sync();
  out[blockIdx.x * 64 + threadIdx.x] = threadIdx.x;
  mbarrier_arrive_cluster(base, PEER);
  mbarrier_wait(base, 0);
  out[blockIdx.x * 64 + threadIdx.x] += out[PEER * 64 + threadIdx.x];
}

// The stage that is handed back was cleared by ordinary stores.
extern "C" __global__ void arrival_is_no_fence(const uint32_t* in, uint32_t* out) {
  SHARED;
  const uint32_t full = base + 1024, empty = full + 8;
  own_barrier(full, 1);
  own_barrier(empty, 128);
  cluster_sync();
  st_shared_u32(base + 4 * threadIdx.x, 0);
  mbarrier_arrive_cluster(empty, 0);
  mbarrier_arrive_cluster(empty, 1);
  if (threadIdx.x == 0) {
    mbarrier_wait(empty, 0);
    mbarrier_arrive_expect_tx(full, 1024);
    if (cluster_rank() == 0) multicast(in, base, 0, full, 3);
  }
  __syncwarp();
  mbarrier_wait(full, 0);
  out[blockIdx.x * 64 + threadIdx.x] = ld_shared_u32(base + 4 * threadIdx.x);
  cluster_sync();
}

extern "C" __global__ void arrives_at_the_cluster_twice(const uint32_t*, uint32_t* out) {
  cluster_arrive_relaxed();
  cluster_arrive_relaxed();
  cluster_wait();
  out[blockIdx.x * 64 + threadIdx.x] = 1;
}

extern "C" __global__ void waits_for_the_cluster_unarrived(const uint32_t*, uint32_t* out) {
  cluster_sync();
  cluster_wait();
  out[blockIdx.x * 64 + threadIdx.x] = 1;
}

// From here on each block makes 256 bytes and copies them into the other one, 512 bytes further on.
#define FULL (base + 1024)
#define EMPTY (base + 1032)
inline void make(uint32_t base) {
  st_shared_u32(base + 4 * threadIdx.x, threadIdx.x);
  fence_proxy_async();
  __syncthreads();
}
inline void exchange(uint32_t base, uint32_t bytes = 256) {
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(FULL, bytes);
    bulk_copy_to_block(base + 512, base, 256, FULL, PEER);
  }
  __syncwarp();
}
inline void take(uint32_t base, uint32_t* out) {
  mbarrier_wait(FULL, 0);
  out[blockIdx.x * 64 + threadIdx.x] = ld_shared_u32(base + 512 + 4 * threadIdx.x);
  cluster_sync();
}
inline void begin(uint32_t base) {
  own_barrier(FULL, 1);
  own_barrier(EMPTY, 64);
  cluster_sync();
}

extern "C" __global__ void block_copy_without_proxy_fence(const uint32_t*, uint32_t* out) {
  SHARED;
  begin(base);
  st_shared_u32(base + 4 * threadIdx.x, threadIdx.x);
  __syncthreads();
  exchange(base);
  take(base, out);
}

extern "C" __global__ void block_copy_of_nothing(const uint32_t*, uint32_t* out) {
  SHARED;
  begin(base);
  exchange(base);
  take(base, out);
}

extern "C" __global__ void block_copy_before_all_have_written(const uint32_t*, uint32_t* out) {
  SHARED;
  begin(base);
  st_shared_u32(base + 4 * threadIdx.x, threadIdx.x);
  fence_proxy_async();
  __syncwarp();
  exchange(base);
  take(base, out);
}

extern "C" __global__ void block_copy_not_waited_for(const uint32_t*, uint32_t* out) {
  SHARED;
  begin(base);
  make(base);
  exchange(base);
  cluster_sync();
  out[blockIdx.x * 64 + threadIdx.x] = ld_shared_u32(base + 512 + 4 * threadIdx.x);
  mbarrier_wait(FULL, 0);
}

extern "C" __global__ void block_copy_of_which_half_is_expected(const uint32_t*, uint32_t* out) {
  SHARED;
  begin(base);
  make(base);
  exchange(base, 128);
  take(base, out);
}

extern "C" __global__ void test_taken_for_a_wait(const uint32_t*, uint32_t* out) {
  SHARED;
  begin(base);
  make(base);
  exchange(base);
  mbarrier_test(FULL, 0);
  out[blockIdx.x * 64 + threadIdx.x] = ld_shared_u32(base + 512 + 4 * threadIdx.x);
  mbarrier_wait(FULL, 0);
  cluster_sync();
}

// The other block's bytes are here, which says nothing of whether its copy has read ours.
extern "C" __global__ void source_written_while_the_peer_gets_it(const uint32_t*, uint32_t* out) {
  SHARED;
  begin(base);
  make(base);
  exchange(base);
  mbarrier_wait(FULL, 0);
  st_shared_u32(base + 4 * threadIdx.x, 0);
  out[blockIdx.x * 64 + threadIdx.x] = ld_shared_u32(base + 512 + 4 * threadIdx.x);
  cluster_sync();
}

extern "C" __global__ void block_copy_over_readers(const uint32_t*, uint32_t* out) {
  SHARED;
  begin(base);
  make(base);
  for (uint32_t round = 0; round < 2; round++) {
    exchange(base);
    mbarrier_wait(FULL, round);
    out[blockIdx.x * 64 + threadIdx.x] = ld_shared_u32(base + 512 + 4 * threadIdx.x);
    fence_proxy_async();
    __syncthreads();   // of the other block's readers it knows nothing
  }
  cluster_sync();
}

// The readers tell the other block that they have read, but their loads may still be under way; a fence there does not help.
extern "C" __global__ void block_copy_over_loads(const uint32_t*, uint32_t* out) {
  SHARED;
  begin(base);
  make(base);
  for (uint32_t round = 0; round < 2; round++) {
    exchange(base);
    mbarrier_wait(FULL, round);
    out[blockIdx.x * 64 + threadIdx.x] = ld_shared_u32(base + 512 + 4 * threadIdx.x);
    mbarrier_arrive_cluster(EMPTY, PEER);
    mbarrier_wait(EMPTY, round);
    fence_proxy_async();
  }
  cluster_sync();
}

extern "C" __global__ void ends_while_the_peer_gets_it(const uint32_t*, uint32_t* out) {
  SHARED;
  begin(base);
  make(base);
  if (threadIdx.x == 0) {
    if (cluster_rank() == 0) bulk_copy_to_block(base + 512, base, 256, FULL, 1);
    else mbarrier_arrive_expect_tx(FULL, 256);
  }
  __syncwarp();
  if (cluster_rank() == 1) mbarrier_wait(FULL, 0);
  out[blockIdx.x * 64 + threadIdx.x] = 1;
}

extern "C" __global__ void block_copy_beyond_the_cluster(const uint32_t*, uint32_t*) {
  SHARED;
  begin(base);
  make(base);
  if (threadIdx.x == 0) bulk_copy_to_block(base + 512, base, 256, FULL, 2);
  cluster_sync();
}

extern "C" __global__ void block_copy_beyond_the_end(const uint32_t*, uint32_t*) {
  SHARED;
  begin(base);
  make(base);
  if (threadIdx.x == 0) bulk_copy_to_block(base + 1920, base, 256, FULL, PEER);
  cluster_sync();
}

extern "C" __global__ void block_copy_misaligned(const uint32_t*, uint32_t*) {
  SHARED;
  begin(base);
  make(base);
  if (threadIdx.x == 0) bulk_copy_to_block(base + 512, base + 8, 128, FULL, PEER);
  cluster_sync();
}

extern "C" __global__ void block_copy_of_some_bytes(const uint32_t*, uint32_t*) {
  SHARED;
  begin(base);
  make(base);
  if (threadIdx.x == 0) bulk_copy_to_block(base + 512, base, 8, FULL, PEER);
  cluster_sync();
}

extern "C" __global__ void block_copy_onto_itself(const uint32_t*, uint32_t*) {
  SHARED;
  begin(base);
  make(base);
  if (threadIdx.x == 0) bulk_copy_to_block(base + 128, base, 256, FULL, cluster_rank());
  cluster_sync();
}
