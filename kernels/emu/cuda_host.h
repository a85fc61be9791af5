// SPDX-License-Identifier: Apache-2.0
// CUDA C++ as host C++: the language's built-ins that the kernels use.
#pragma once
#ifndef ZS_EMU
#error "host twin of CUDA: only for the emulator"
#endif
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include "host/api.h"

#define __device__
#define __host__
#define __global__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define ZS_SMEM(name) uint8_t* const name = ::zsemu::shared_base()

#define threadIdx (::zsemu::thread_idx())
#define blockIdx (::zsemu::block_idx())
#define blockDim (::zsemu::block_dim())
#define gridDim (::zsemu::grid_dim())

// ---- vector types
#define ZS_EMU_VEC(type, name, a2, a4)                              \
  struct alignas(a2) name##2 { type x, y; };                        \
  struct name##3 { type x, y, z; };                                 \
  struct alignas(a4) name##4 { type x, y, z, w; };                  \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }  \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
ZS_EMU_VEC(unsigned char, uchar, 2, 4)
ZS_EMU_VEC(unsigned short, ushort, 4, 8)
ZS_EMU_VEC(short, short, 4, 8)
ZS_EMU_VEC(unsigned int, uint, 8, 16)
ZS_EMU_VEC(int, int, 8, 16)
ZS_EMU_VEC(float, float, 8, 16)
ZS_EMU_VEC(unsigned long long, ulonglong, 16, 16)
#undef ZS_EMU_VEC

// ---- barriers, warp functions
inline void __syncthreads() { zsemu::barrier_sync(0, 0); }
inline int __syncthreads_or(int p) { return int(zsemu::barrier_reduce(zsemu::Vote::any, p != 0)); }
inline int __syncthreads_and(int p) { return int(zsemu::barrier_reduce(zsemu::Vote::all, p != 0)); }
inline int __syncthreads_count(int p) { return int(zsemu::barrier_reduce(zsemu::Vote::ballot, p != 0)); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { zsemu::warp_sync(mask); }
inline unsigned __ballot_sync(unsigned mask, int p) { return zsemu::vote(zsemu::Vote::ballot, mask, p != 0); }
inline int __any_sync(unsigned mask, int p) { return int(zsemu::vote(zsemu::Vote::any, mask, p != 0)); }
inline int __all_sync(unsigned mask, int p) { return int(zsemu::vote(zsemu::Vote::all, mask, p != 0)); }

namespace zsemu {
template <class T>
inline T shuffle_value(Shuffle kind, unsigned mask, T v, unsigned arg, int width) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t u = 0;
  memcpy(&u, &v, sizeof v);
  u = shuffle(kind, mask, u, arg, uint32_t(width));
  memcpy(&v, &u, sizeof v);
  return v;
}
template <class T>
inline uint64_t widen_match(T v) {
  uint64_t u = 0;
  memcpy(&u, &v, sizeof v);
  return u;
}
}  // namespace zsemu
template <class T>
inline T __shfl_sync(unsigned mask, T v, int lane, int width = 32) { return zsemu::shuffle_value(zsemu::Shuffle::idx, mask, v, unsigned(lane), width); }
template <class T>
inline T __shfl_up_sync(unsigned mask, T v, unsigned n, int width = 32) { return zsemu::shuffle_value(zsemu::Shuffle::up, mask, v, n, width); }
template <class T>
inline T __shfl_down_sync(unsigned mask, T v, unsigned n, int width = 32) { return zsemu::shuffle_value(zsemu::Shuffle::down, mask, v, n, width); }
template <class T>
inline T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32) { return zsemu::shuffle_value(zsemu::Shuffle::bfly, mask, v, unsigned(lanes), width); }
template <class T>
inline unsigned __match_any_sync(unsigned mask, T v) { return zsemu::match_any(mask, zsemu::widen_match(v)); }

inline unsigned __reduce_add_sync(unsigned mask, unsigned v) { return zsemu::reduce(zsemu::Reduce::add, mask, v); }
inline int __reduce_add_sync(unsigned mask, int v) { return int(zsemu::reduce(zsemu::Reduce::add, mask, unsigned(v))); }
inline unsigned __reduce_min_sync(unsigned mask, unsigned v) { return zsemu::reduce(zsemu::Reduce::min_u, mask, v); }
inline int __reduce_min_sync(unsigned mask, int v) { return int(zsemu::reduce(zsemu::Reduce::min_s, mask, unsigned(v))); }
inline unsigned __reduce_max_sync(unsigned mask, unsigned v) { return zsemu::reduce(zsemu::Reduce::max_u, mask, v); }
inline int __reduce_max_sync(unsigned mask, int v) { return int(zsemu::reduce(zsemu::Reduce::max_s, mask, unsigned(v))); }
inline unsigned __reduce_and_sync(unsigned mask, unsigned v) { return zsemu::reduce(zsemu::Reduce::and_, mask, v); }
inline unsigned __reduce_or_sync(unsigned mask, unsigned v) { return zsemu::reduce(zsemu::Reduce::or_, mask, v); }
inline unsigned __reduce_xor_sync(unsigned mask, unsigned v) { return zsemu::reduce(zsemu::Reduce::xor_, mask, v); }

// ---- atomics (relaxed, as CUDA's are) and fences
namespace zsemu {
template <class T>
inline T atomic_value(Atomic op, T* p, T a, T b = T()) {
  uint64_t ua = 0, ub = 0;
  memcpy(&ua, &a, sizeof a);
  memcpy(&ub, &b, sizeof b);
  ua = atomic(op, Order::relaxed, p, sizeof(T), ua, ub);
  memcpy(&a, &ua, sizeof a);
  return a;
}
}  // namespace zsemu
inline unsigned atomicAdd(unsigned* p, unsigned v) { return zsemu::atomic_value(zsemu::Atomic::add, p, v); }
inline int atomicAdd(int* p, int v) { return zsemu::atomic_value(zsemu::Atomic::add, p, v); }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) { return zsemu::atomic_value(zsemu::Atomic::add, p, v); }
inline float atomicAdd(float* p, float v) { return zsemu::atomic_value(zsemu::Atomic::add_f32, p, v); }
inline unsigned atomicMin(unsigned* p, unsigned v) { return zsemu::atomic_value(zsemu::Atomic::min_u, p, v); }
inline unsigned atomicMax(unsigned* p, unsigned v) { return zsemu::atomic_value(zsemu::Atomic::max_u, p, v); }
inline unsigned atomicOr(unsigned* p, unsigned v) { return zsemu::atomic_value(zsemu::Atomic::or_, p, v); }
inline unsigned atomicAnd(unsigned* p, unsigned v) { return zsemu::atomic_value(zsemu::Atomic::and_, p, v); }
inline unsigned atomicXor(unsigned* p, unsigned v) { return zsemu::atomic_value(zsemu::Atomic::xor_, p, v); }
inline unsigned atomicExch(unsigned* p, unsigned v) { return zsemu::atomic_value(zsemu::Atomic::exch, p, v); }
inline unsigned atomicCAS(unsigned* p, unsigned a, unsigned b) { return zsemu::atomic_value(zsemu::Atomic::cas, p, a, b); }
inline void __threadfence() { zsemu::thread_fence(); }
inline void __threadfence_system() { zsemu::thread_fence(); }
inline void __threadfence_block() { zsemu::thread_fence(); }
inline void __nanosleep(unsigned) { zsemu::sleep(); }
inline void __trap() { zsemu::trap("__trap()"); }

// ---- arithmetic
template <class T>
inline T __ldg(const T* p) { return *p; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (v >> i & 1) << (31 - i);
  return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned s) { return unsigned((((unsigned long long)hi << 32 | lo) << (s & 31)) >> 32); }
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned s) { return unsigned(((unsigned long long)hi << 32 | lo) >> (s & 31)); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned sel) {
  unsigned long long v = (unsigned long long)b << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) r |= unsigned(v >> (8 * (sel >> (4 * i) & 7)) & 255) << (8 * i);
  return r;
}
inline unsigned __float_as_uint(float f) { return unsigned(zsemu::widen_match(f)); }
inline int __float_as_int(float f) { return int(__float_as_uint(f)); }
inline float __uint_as_float(unsigned u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline float __int_as_float(int u) { return __uint_as_float(unsigned(u)); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

namespace zsemu {
template <class A, class B> struct Common { using T = decltype(true ? A() : B()); };
}
template <class A, class B>
inline typename zsemu::Common<A, B>::T min(A a, B b) {
  using T = typename zsemu::Common<A, B>::T;
  return T(a) < T(b) ? T(a) : T(b);
}
template <class A, class B>
inline typename zsemu::Common<A, B>::T max(A a, B b) {
  using T = typename zsemu::Common<A, B>::T;
  return T(a) > T(b) ? T(a) : T(b);
}
