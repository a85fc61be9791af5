// SPDX-License-Identifier: Apache-2.0
// Registers a kernel under its name and unpacks its parameters, whatever their types: each has a slot of 8 bytes, a struct as many as it is long.
#pragma once
#include <cstring>
#include <tuple>
#include "api.h"

namespace zsemu {
template <class T>
constexpr size_t slots = (sizeof(T) + 7) / 8;
template <class T>
inline T unpack(const uint64_t*& a) {
  T t;
  memcpy(&t, a, sizeof t);
  a += slots<T>;
  return t;
}
template <class... P>
inline void call_kernel(void (*f)(P...), const uint64_t* a) {
  const std::tuple<P...> in{unpack<P>(a)...};  // braces: from left to right
  std::apply(f, in);
}
template <class... P>
constexpr int count_params(void (*)(P...)) {
  return int((slots<P> + ... + 0));
}
}  // namespace zsemu

#define ZS_EMU_ENTRY(kernel)                                                            \
  static void zsemu_call_##kernel(const uint64_t* a) { zsemu::call_kernel(&kernel, a); } \
  static zsemu::Entry zsemu_entry_##kernel(#kernel, zsemu_call_##kernel, zsemu::count_params(&kernel));

#define ZS_EMU_CONSTANT(name) static zsemu::Constant zsemu_constant_##name(#name, (long long)(name));
