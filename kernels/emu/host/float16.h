// SPDX-License-Identifier: Apache-2.0
// 16-bit floating point to FP32, exactly.
#pragma once
#include <cstdint>
#include <cstring>

namespace zsemu {
inline float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline float widen(uint16_t v, bool fp16) {
  if (!fp16) return bits_to_float(uint32_t(v) << 16);
  uint32_t sign = uint32_t(v & 0x8000) << 16, e = v >> 10 & 31, m = v & 1023;
  if (e == 31) return bits_to_float(sign | 0x7F800000u | m << 13);
  if (e) return bits_to_float(sign | (e + 112) << 23 | m << 13);
  float f = float(m) * (1.0f / 16777216.0f);
  return sign ? -f : f;
}
}  // namespace zsemu
