// SPDX-License-Identifier: Apache-2.0
// Stacks and the switch between them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace zsemu {
constexpr size_t kStack = 128 << 10;
uint8_t* take_stack();                  // lowest address of a stack with a guard page below it
void return_stack(uint8_t* stack);
void* prepare_stack(uint8_t* stack, void (*entry)());
void switch_stack(void** save, void* to);
}  // namespace zsemu
