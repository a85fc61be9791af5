// SPDX-License-Identifier: Apache-2.0
// Host twins of kernels/ptx.cuh: the same names, the same meaning, checked by the emulator.
#pragma once
#include "cuda_host.h"

#define ZS_DEVICE inline

inline uint32_t smem_addr(const void* p) { return zsemu::shared_addr(p); }

// ---- bit work
inline uint32_t select_bits(uint32_t a, uint32_t b, uint32_t mask) { return (a & ~mask) | (b & mask); }
inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t c) { return (a & mask) | c; }
inline uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t sel) { return __byte_perm(a, b, sel); }
inline uint32_t mad_lo(uint32_t a, uint32_t b, uint32_t c) { return a * b + c; }
inline uint32_t round_bf16(float f) {
  uint32_t u = __float_as_uint(f);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFFu;   // the NaN that cvt makes
  return (u + 0x7FFFu + (u >> 16 & 1)) >> 16;
}
inline uint32_t pack_bf16(float lo, float hi) { return round_bf16(lo) | round_bf16(hi) << 16; }
inline float without_subnormals(float v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; }
inline float exp2_approx(float v) { return without_subnormals(std::exp2(v)); }
inline float reciprocal_approx(float v) { return without_subnormals(1.0f / without_subnormals(v)); }

// ---- global memory
struct Vec4 {
  uint32_t x, y, z, w;
};
namespace zsemu {
template <class T>
inline T from_global(const void* p) {
  T v;
  load_global(&v, p, sizeof v);
  return v;
}
template <class T>
inline T from_shared(uint32_t addr) {
  T v;
  load_shared(&v, addr, sizeof v);
  return v;
}
}  // namespace zsemu
inline uint32_t ld_stream_u16(const void* p) { return zsemu::from_global<uint16_t>(p); }
inline uint32_t ld_stream_u32(const void* p) { return zsemu::from_global<uint32_t>(p); }
inline uint64_t ld_stream_u64(const void* p) { return zsemu::from_global<uint64_t>(p); }
inline Vec4 ld_stream_v4(const void* p) { return zsemu::from_global<Vec4>(p); }
inline Vec4 ld_global_v4(const void* p) { return zsemu::from_global<Vec4>(p); }
inline void st_global_v4(void* p, Vec4 v) { zsemu::store_global(p, &v, sizeof v); }
inline void st_global_v2(void* p, uint32_t x, uint32_t y) {
  const uint32_t v[2] = {x, y};
  zsemu::store_global(p, v, sizeof v);
}
inline void st_stream_v4(void* p, Vec4 v) { zsemu::store_global(p, &v, sizeof v); }
// Relaxed: each word is whole, four of them are not.
inline Vec4 ld_relaxed_v4(const void* p) {
  uint32_t w[4];
  zsemu::load_relaxed(w, p, 4);
  return Vec4{w[0], w[1], w[2], w[3]};
}
inline void st_relaxed_v4(void* p, Vec4 v) {
  const uint32_t w[4] = {v.x, v.y, v.z, v.w};
  zsemu::store_relaxed(p, w, 4);
}
inline uint32_t ld_acquire_u32(const uint32_t* p) { return uint32_t(zsemu::atomic(zsemu::Atomic::load, zsemu::Order::acquire, (void*)p, 4, 0, 0)); }
inline void st_release_u32(uint32_t* p, uint32_t v) { zsemu::atomic(zsemu::Atomic::store, zsemu::Order::release, p, 4, v, 0); }
inline void red_release_add_u32(uint32_t* p, uint32_t v) { zsemu::atomic(zsemu::Atomic::add, zsemu::Order::release, p, 4, v, 0); }
inline void fence_release() { zsemu::thread_fence(); }
inline void red_add_relaxed(uint32_t* p, uint32_t v) { zsemu::atomic(zsemu::Atomic::add, zsemu::Order::relaxed, p, 4, v, 0); }
inline uint32_t atom_inc_relaxed(uint32_t* p, uint32_t limit) { return uint32_t(zsemu::atomic(zsemu::Atomic::inc, zsemu::Order::relaxed, p, 4, limit, 0)); }
inline uint32_t atom_add_acq_rel(uint32_t* p, uint32_t v) { return uint32_t(zsemu::atomic(zsemu::Atomic::add, zsemu::Order::acq_rel, p, 4, v, 0)); }

// ---- shared memory
inline Vec4 ld_shared_v4(uint32_t addr) { return zsemu::from_shared<Vec4>(addr); }
inline uint32_t ld_shared_u32(uint32_t addr) { return zsemu::from_shared<uint32_t>(addr); }
inline uint32_t ld_shared_u16(uint32_t addr) { return zsemu::from_shared<uint16_t>(addr); }
inline void st_shared_v4(uint32_t addr, Vec4 v) { zsemu::store_shared(addr, &v, sizeof v); }
inline void st_shared_u32(uint32_t addr, uint32_t v) { zsemu::store_shared(addr, &v, sizeof v); }
inline void st_shared_u16(uint32_t addr, uint32_t v) {
  uint16_t h = uint16_t(v);
  zsemu::store_shared(addr, &h, sizeof h);
}
inline void pin(const uint8_t*&) {}
inline void pause_clocks(uint32_t) {}
// Bytes that nobody reads: races on them mean nothing.
inline void scratch_bytes(uint32_t addr, uint32_t bytes) { zsemu::scratch(addr, bytes); }
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr) { zsemu::ldmatrix(r, 4, addr, false); }
inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t addr) { zsemu::ldmatrix(r, 2, addr, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t addr) { zsemu::ldmatrix(r, 4, addr, true); }
inline void store_matrices_transposed(uint32_t addr, const Vec4& v) {
  const uint32_t w[4] = {v.x, v.y, v.z, v.w};
  zsemu::stmatrix(w, 4, addr, true);
}
inline uint32_t transpose_8x8(uint32_t v) {
  uint32_t lane = threadIdx.x % 32, half = 16 * (lane / 4 % 2), out = 0;
  for (uint32_t i = 0; i < 2; i++) {
    uint64_t from = zsemu::shuffle(zsemu::Shuffle::idx, 0xFFFFFFFFu, v, 4 * (2 * (lane % 4) + i) + lane / 8, 32);
    out |= (uint32_t(from) >> half & 0xFFFFu) << 16 * i;
  }
  return out;
}

// ---- tensor cores
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { zsemu::mma_m16n8k16(d, a, b0, b1, false); }
inline void wgmma_fence() { zsemu::wgmma_fence(); }
inline void wgmma_commit() { zsemu::wgmma_commit(); }
template <int N>
inline void wgmma_wait() {
  zsemu::wgmma_wait(N);
}
// Holds the accumulators in place for the compiler: nothing to do here, they live in memory.
template <int N>
inline void wgmma_pin(float (&)[N]) {}
// d[64 x N] += a[64 x 16] * b[16 x N], both operands given by descriptors.
template <int N>
inline void wgmma_m64k16_bf16(float (&d)[N / 2], uint64_t a, uint64_t b) {
  zsemu::wgmma(d, N, nullptr, a, b, true, false);
}
template <int N>
inline void setmaxnreg_inc() {}
template <int N>
inline void setmaxnreg_dec() {}

// ---- asynchronous copies
inline void cp_async_16(uint32_t dst, const void* src) { zsemu::cp_async(dst, src, 16, 16); }
inline void cp_async_16_zfill(uint32_t dst, const void* src, uint32_t src_bytes) { zsemu::cp_async(dst, src, 16, src_bytes); }
inline void cp_async_commit() { zsemu::cp_async_commit(); }
inline void cp_async_mbarrier_arrive(uint32_t bar) { zsemu::cp_async_mbarrier_arrive(bar); }
template <int N>
inline void cp_async_wait() {
  zsemu::cp_async_wait(N);
}
inline void bulk_copy_g2s(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) { zsemu::bulk_g2s(dst, src, bytes, bar); }
inline void bulk_copy_s2g(void* dst, uint32_t src, uint32_t bytes) { zsemu::bulk_s2g(dst, src, bytes); }
template <int N>
inline void bulk_copies_done() {
  zsemu::stores_done(N);
}
template <int N = 0>
inline void bulk_copies_read() {
  zsemu::stores_read(N);
}
inline void prefetch_l2(const void* p, uint32_t bytes) { zsemu::prefetch(p, bytes); }
// The emulator has no descriptors: the description that comes with one says it all.
struct TensorMap {
  uint64_t unused;
};
struct TensorRows {
  const uint16_t* data;
  uint64_t ld;
  uint32_t rows, columns, box;
  uint32_t matrices = 1;
};
inline void prefetch_map(const TensorMap&) {}
inline void tensor_copy(uint32_t dst, const TensorMap&, const TensorRows& m, uint32_t column, uint32_t row, uint32_t bar) {
  zsemu::tensor_g2s(dst, m.data, m.ld * 2, m.rows, m.columns, row, column, m.box, bar);
}
inline void tensor_copy_multicast(uint32_t dst, const TensorMap&, const TensorRows& m, uint32_t column, uint32_t row, uint32_t bar, uint16_t mask) {
  zsemu::tensor_multicast(dst, m.data, m.ld * 2, m.rows, m.columns, row, column, m.box, bar, mask);
}
inline void tensor_store(const TensorMap&, const TensorRows& m, uint32_t column, uint32_t row, uint32_t matrix, uint32_t src) {
  zsemu::tensor_s2g((void*)(m.data + matrix * (m.rows * m.ld)), m.ld * 2, matrix < m.matrices ? m.rows : 0, m.columns, row, column, m.box, src);
}

// ---- barriers
inline void mbarrier_init(uint32_t bar, uint32_t count) { zsemu::mbarrier_init(bar, count); }
inline void mbarrier_arrive(uint32_t bar, uint32_t count = 1) { zsemu::mbarrier_arrive(bar, count); }
inline void mbarrier_expect_tx(uint32_t bar, uint32_t bytes) { zsemu::mbarrier_expect_tx(bar, bytes); }
inline void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  zsemu::mbarrier_expect_tx(bar, bytes);
  zsemu::mbarrier_arrive(bar, 1);
}
inline void mbarrier_wait(uint32_t bar, uint32_t parity) { zsemu::mbarrier_wait(bar, parity); }
inline bool mbarrier_test(uint32_t bar, uint32_t parity) { return zsemu::mbarrier_test(bar, parity); }
inline void fence_mbarrier_init() { zsemu::fence_mbarrier_init(); }
inline void fence_proxy_async() { zsemu::fence_proxy_async(); }
inline void fence_proxy_async_global() { zsemu::fence_proxy_async_global(); }
inline void named_barrier_sync(uint32_t id, uint32_t threads) { zsemu::barrier_sync(id, threads); }
inline void named_barrier_arrive(uint32_t id, uint32_t threads) { zsemu::barrier_arrive(id, threads); }
// ---- thread-block clusters
inline uint32_t cluster_rank() { return zsemu::cluster_rank(); }
inline void cluster_sync() { zsemu::cluster_sync(); }
inline void cluster_arrive_relaxed() { zsemu::cluster_arrive_relaxed(); }
inline void cluster_wait() { zsemu::cluster_wait(); }
inline void mbarrier_arrive_cluster(uint32_t bar, uint32_t rank, uint32_t count = 1) { zsemu::mbarrier_arrive_cluster(bar, rank, count); }
inline void bulk_copy_to_block(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar, uint32_t rank) { zsemu::bulk_s2s(dst, src, bytes, bar, rank); }

inline void griddep_wait() { zsemu::griddep_wait(); }
inline void griddep_launch() { zsemu::griddep_launch(); }

// ---- errors
inline void fail_index() { zsemu::trap("an index is not a row of the table"); }
