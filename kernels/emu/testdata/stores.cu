// SPDX-License-Identifier: Apache-2.0
// What leaves shared memory by the copy engine, and who may read it: small correct kernels. store_test.go knows what they must compute.
#include "emu/ptx_host.h"

// Each warp makes pieces of 512 bytes, of one while another is still under way.
extern "C" __global__ void bulk_stores(const uint32_t* in, uint32_t* out, uint32_t pieces) {
  ZS_SMEM(smem);
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, base = smem_addr(smem) + warp * 1024;
  for (uint32_t p = warp, round = 0; p < pieces; p += blockDim.x / 32, round++) {
    const uint32_t at = base + round % 2 * 512;
    const Vec4 v = ld_global_v4(in + p * 128 + lane * 4);
    st_shared_v4(at + lane * 16, Vec4{v.w, v.z, v.y, v.x});
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) {
      bulk_copy_s2g(out + p * 128, at, 512);
      bulk_copies_read<1>();
    }
    __syncwarp();
  }
  if (lane == 0) {
    bulk_copies_done<1>();
    bulk_copies_done<0>();
    for (uint32_t p = warp; p < pieces; p += blockDim.x / 32) out[p * 128] += 1;
  }
}

// y[matrices, rows, columns] = in, by boxes of 16 rows of 64 columns that stand over the ends, of one matrix more than there are; a warp for each.
extern "C" __global__ void tensor_stores(const uint16_t* in, uint16_t* y, uint64_t ld, uint32_t rows, uint32_t columns, uint32_t matrices) {
  ZS_SMEM(smem);
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, at = smem_addr(smem) + warp * 2048, boxes = (columns + 63) / 64;
  const uint32_t across = (rows + 15) / 16, row = warp / boxes % across * 16, column = warp % boxes * 64, matrix = warp / boxes / across;
  for (uint32_t i = lane; i < 16 * 64; i += 32) {
    const uint32_t r = i / 64, c = i % 64;
    const uint16_t v = matrix < matrices && row + r < rows && column + c < columns ? in[(matrix * rows + row + r) * columns + column + c] : 0xDEAD;
    st_shared_u16(at + r * 128 + ((c / 8 ^ r % 8) << 4) + c % 8 * 2, v);
  }
  fence_proxy_async();
  __syncwarp();
  if (lane == 0) {
    tensor_store(TensorMap{}, TensorRows{y, ld, rows, columns, 16, matrices}, column, row, matrix, at);
    bulk_copies_read();  // what is written may come later than the end of the block, but not what is read
  }
}

// Matrix i of a warp: element (row, column) is i, row and column. Stored transposed, then as words.
extern "C" __global__ void stored_matrices(uint32_t* out) {
  ZS_SMEM(smem);
  const uint32_t base = smem_addr(smem), lane = threadIdx.x;
  uint32_t v[4];
  for (uint32_t i = 0; i < 4; i++) {
    const uint32_t first = i << 8 | lane / 4 << 4 | lane % 4 * 2;
    v[i] = first | (first + 1) << 16;
  }
  store_matrices_transposed(base + lane / 8 * 128 + lane % 8 * 16, Vec4{v[0], v[1], v[2], v[3]});
  __syncwarp();
  for (uint32_t i = 0; i < 4; i++) out[i * 32 + lane] = ld_shared_u32(base + i * 128 + lane * 4);
}

// Blocks take tickets, make a piece for each and tell of it; every block reads all pieces as they come, by copies. Tickets and flags start with all bits set.
extern "C" __global__ void relay(uint32_t* control, uint32_t* pieces, uint32_t* out, uint32_t count) {
  ZS_SMEM(smem);
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, base = smem_addr(smem), full = base + 1536;
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (warp > 0) {
    const uint32_t at = base + warp * 512;
    while (true) {
      uint32_t mine = lane == 0 ? atom_inc_relaxed(control, 0xFFFFFFF0u) + 1 : 0;
      mine = __shfl_sync(~0u, mine, 0);
      if (mine >= count) break;
      st_shared_v4(at + lane * 16, Vec4{mine, lane, 0, 0});
      fence_proxy_async();
      __syncwarp();
      if (lane == 0) {
        bulk_copy_s2g(pieces + mine * 128, at, 512);
        bulk_copies_done<0>();
        fence_release();
        red_add_relaxed(control + 2 + mine, 1);
      }
      __syncwarp();
    }
  } else {
    uint32_t sum = 0, parity = 0;
    for (uint32_t first = 0; first < count; first += 32) {
      while (true) {
        const bool here = first + lane >= count || ld_acquire_u32(control + 2 + first + lane) == 0;
        if (__all_sync(~0u, here)) break;
      }
      __syncwarp();
      if (lane == 0) fence_proxy_async_global();
      for (uint32_t p = first; p < min(count, first + 32); p++, parity ^= 1) {
        if (lane == 0) {
          mbarrier_arrive_expect_tx(full, 512);
          bulk_copy_g2s(base, pieces + p * 128, 512, full);
        }
        mbarrier_wait(full, parity);
        const Vec4 v = ld_shared_v4(base + lane * 16);
        sum += (v.x + 1) * (v.y + 1);
        fence_proxy_async();   // the next copy goes over these loads
        __syncwarp();
      }
    }
    sum = __reduce_add_sync(~0u, sum);
    if (lane == 0) out[blockIdx.x] = sum;
  }
  // The last block cleans up.
  __syncthreads();
  uint32_t last = 0;
  if (threadIdx.x == 0) last = atom_add_acq_rel(control + 1, 1) + 2 == gridDim.x;
  if (__syncthreads_or((int)last))
    for (uint32_t i = threadIdx.x; i < 2 + count; i += blockDim.x) control[i] = 0xFFFFFFFFu;
}

// Arrivals that count for many, also at another block of the cluster.
extern "C" __global__ void counted_arrivals(uint32_t* out) {
  ZS_SMEM(smem);
  const uint32_t base = smem_addr(smem);
  if (threadIdx.x == 0) {
    mbarrier_init(base, 7);
    mbarrier_init(base + 8, 10);
    fence_mbarrier_init();
  }
  cluster_sync();
  if (threadIdx.x < 2) mbarrier_arrive(base, threadIdx.x == 0 ? 3 : 4);
  __syncwarp();
  mbarrier_wait(base, 0);
  if (threadIdx.x < 2) mbarrier_arrive_cluster(base + 8, threadIdx.x, 5);
  __syncwarp();
  mbarrier_wait(base + 8, 0);
  out[blockIdx.x * 32 + threadIdx.x] = 1;
  cluster_sync();
}
