// SPDX-License-Identifier: Apache-2.0
// Registers a kernel under its name and unpacks its parameters, whatever their types (8 bytes at most each).
#pragma once
#include <cstring>
#include <utility>
#include "api.h"

namespace zsemu {
template <class T>
inline T unpack(uint64_t slot) {
  static_assert(sizeof(T) <= 8, "kernel parameters are scalars and pointers");
  T t;
  memcpy(&t, &slot, sizeof t);
  return t;
}
template <class... P, size_t... I>
inline void call_kernel(void (*f)(P...), const uint64_t* a, std::index_sequence<I...>) {
  f(unpack<P>(a[I])...);
}
template <class... P>
inline void call_kernel(void (*f)(P...), const uint64_t* a) {
  call_kernel(f, a, std::index_sequence_for<P...>{});
}
template <class... P>
constexpr int count_params(void (*)(P...)) {
  return int(sizeof...(P));
}
}  // namespace zsemu

#define ZS_EMU_ENTRY(kernel)                                                            \
  static void zsemu_call_##kernel(const uint64_t* a) { zsemu::call_kernel(&kernel, a); } \
  static zsemu::Entry zsemu_entry_##kernel(#kernel, zsemu_call_##kernel, zsemu::count_params(&kernel));

#define ZS_EMU_CONSTANT(name) static zsemu::Constant zsemu_constant_##name(#name, (long long)(name));
