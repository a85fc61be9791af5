// SPDX-License-Identifier: Apache-2.0
// Floats as the words they are.
#pragma once
#include "ptx.cuh"

ZS_DEVICE float as_float(uint32_t v) {
    union {
        uint32_t u;
        float f;
    } c;
    c.u = v;
    return c.f;
}
ZS_DEVICE uint32_t as_bits(float v) {
    union {
        uint32_t u;
        float f;
    } c;
    c.f = v;
    return c.u;
}
