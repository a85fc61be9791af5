// SPDX-License-Identifier: Apache-2.0
// Arithmetic on the two 16-bit halves of a word, as the compressor uses it. Nothing here touches memory, so the host twins stand beside the instructions.
#pragma once
#include "ptx.cuh"

#define ZS_EACH(x) ((uint32_t)(x) * 0x10001u)  // the same 16 bits in both halves of a word

#ifdef ZS_EMU

namespace zs_host {
inline uint32_t each(uint32_t a, uint32_t b, uint32_t (*f)(uint32_t, uint32_t)) { return (f(a & 0xFFFF, b & 0xFFFF) & 0xFFFF) | f(a >> 16, b >> 16) << 16; }
inline double half(uint32_t h) {
    const double m = h & 0x3FF, sign = h & 0x8000 ? -1 : 1;
    const int e = h >> 10 & 31;
    return e == 31 ? (h & 0x3FF ? NAN : sign * INFINITY) : sign * (e ? std::ldexp(1024 + m, e - 25) : std::ldexp(m, -24));
}
// The thresholds of the compressor give 0 and 1 only; anything else is a mistake that the tests are to see.
inline uint32_t step(uint32_t x, uint32_t scale, uint32_t shift) {
    const double v = half(x) * half(scale) + half(shift);
    return v >= 1 ? 1 : v <= 0 || v != v ? 0 : 77;
}
}  // namespace zs_host
inline uint32_t max_halves(uint32_t a, uint32_t b) {
    return zs_host::each(a, b, [](uint32_t x, uint32_t y) { return x > 0x7C00 || y > 0x7C00 ? 0x7FFFu : x > y ? x : y; });
}
inline uint32_t min_halves(uint32_t a, uint32_t b) {
    return zs_host::each(a, b, [](uint32_t x, uint32_t y) { return x > 0x7C00 || y > 0x7C00 ? 0x7FFFu : x < y ? x : y; });
}
inline uint32_t abs_halves(uint32_t x) { return x & 0x7FFF7FFFu; }
inline uint32_t count_steps(uint32_t count, uint32_t x, uint32_t scale, uint32_t shift) {
    return count + (zs_host::step(x & 0xFFFF, scale & 0xFFFF, shift & 0xFFFF) | zs_host::step(x >> 16, scale >> 16, shift >> 16) << 16);
}
inline int32_t dot_low(uint32_t a, uint32_t b, int32_t c) { return (int32_t)((uint32_t)c + (uint32_t)((int16_t)a * (int32_t)(b & 0xFF) + (int16_t)(a >> 16) * (int32_t)(b >> 8 & 0xFF))); }
inline int32_t dot_high(uint32_t a, uint32_t b, int32_t c) { return (int32_t)((uint32_t)c + (uint32_t)((int16_t)a * (int32_t)(int8_t)(b >> 16) + (int16_t)(a >> 16) * (int32_t)(int8_t)(b >> 24))); }

#else

// Larger and smaller of two halves without sign, read as FP16: the order of the numbers is that of their bits. A NaN of FP16 gives 0x7FFF.
ZS_DEVICE uint32_t max_halves(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
ZS_DEVICE uint32_t min_halves(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// Both halves without their signs. No instruction of its own: the arithmetic of FP16 does it on the way.
ZS_DEVICE uint32_t abs_halves(uint32_t x) {
    uint32_t d;
    asm("abs.f16x2 %0, %1;" : "=r"(d) : "r"(x));
    return d;
}

// count + (x * scale + shift, cut to 0 .. 1), FP16 in both halves. Two instructions of the FMA pipe at its full rate.
ZS_DEVICE uint32_t count_steps(uint32_t count, uint32_t x, uint32_t scale, uint32_t shift) {
    uint32_t d;
    asm("{ .reg .b32 s; fma.rn.sat.f16x2 s, %2, %3, %4; add.rn.f16x2 %0, %1, s; }" : "=r"(d) : "r"(count), "r"(x), "r"(scale), "r"(shift));
    return d;
}

// c + the products of the signed halves of a with bytes 0 and 1 of b (unsigned), or with bytes 2 and 3 (signed).
ZS_DEVICE int32_t dot_low(uint32_t a, uint32_t b, int32_t c) {
    int32_t d;
    asm("dp2a.lo.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
ZS_DEVICE int32_t dot_high(uint32_t a, uint32_t b, int32_t c) {
    int32_t d;
    asm("dp2a.hi.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

#endif

// The halves of a + b, each at most that of `limit`; without signs, and without a carry from half to half. One instruction on sm_90.
#ifdef ZS_EMU
inline uint32_t add_min_halves(uint32_t a, uint32_t b, uint32_t limit) {
    const uint32_t sum = zs_host::each(a, b, [](uint32_t x, uint32_t y) { return x + y; });
    return zs_host::each(sum, limit, [](uint32_t x, uint32_t y) { return x < y ? x : y; });
}
#elif __CUDA_ARCH__ >= 900
ZS_DEVICE uint32_t add_min_halves(uint32_t a, uint32_t b, uint32_t limit) {
    uint32_t d;
    asm("{ .reg .b32 s; add.u16x2 s, %1, %2; min.u16x2 %0, s, %3; }" : "=r"(d) : "r"(a), "r"(b), "r"(limit));
    return d;
}
#endif

// Codes of a pair of weights: in bits 7 .. 9 of each half exponent - base where that is 0 .. 7, else 8 in bits 7 .. 10. pair: bits 0x7F80 of the
// weights; base2: the base exponent at bit 7 of both halves.
ZS_DEVICE uint32_t window_codes(uint32_t pair, uint32_t base2) {
#if defined(ZS_EMU) || __CUDA_ARCH__ >= 900
    const uint32_t codes = add_min_halves(pair, ZS_EACH(0x10000u - (base2 & 0xFFFFu) & 0xFFFFu), ZS_EACH(0x400));
#endif
#if defined(ZS_EMU) || __CUDA_ARCH__ < 900
    const uint32_t v = ((pair | ZS_EACH(0x8000)) - base2) ^ ZS_EACH(0x8000);  // bit 15: below the base
    const uint32_t out = (((v & ZS_EACH(0x7C00)) + ZS_EACH(0x7C00)) | v) & ZS_EACH(0x8000);
    const uint32_t slowly = (v & ZS_EACH(0x380) & ~((out >> 5) - (out >> 8))) | out >> 5;
#endif
#ifdef ZS_EMU
    if (codes != slowly) __trap();
#endif
#if defined(ZS_EMU) || __CUDA_ARCH__ >= 900
    return codes;
#else
    return slowly;
#endif
}
