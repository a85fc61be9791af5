// SPDX-License-Identifier: Apache-2.0
// What a mixture-of-experts layer's router said, as the grouped product wants it: zs_moe_route writes it, zs_zipgemm_grouped reads it.
//
// A *pair* is a token and one of its experts, numbered token * top + slot. An *item* is one expert and at most `tile` of its pairs. All of it is 32-bit words:
//
//     number of items, 3 unused | items, room for one a pair: expert, first, count, unused | numbers of pairs, expert by expert, each expert's rising | their tokens
//
// `first` and `count` are of the two lists. Pairs whose expert is not here (a number below 0, or beyond the last expert) are in no item.
#pragma once
#include "ptx.cuh"

#define ZS_ROUTING_HEAD 4
#define ZS_ROUTING_ITEM 4

struct Routing {
    const uint32_t *head, *items, *pairs, *owners;  // owners: tokens of the pairs
    ZS_DEVICE Routing(const uint32_t* words, uint32_t count) : head(words), items(words + ZS_ROUTING_HEAD), pairs(items + (uint64_t)ZS_ROUTING_ITEM * count), owners(pairs + count) {}
    // Plain loads: the kernel before this one has written it.
    ZS_DEVICE uint32_t count() const { return *head; }
    ZS_DEVICE uint32_t expert(uint32_t item) const { return items[ZS_ROUTING_ITEM * item]; }
    ZS_DEVICE uint32_t first(uint32_t item) const { return items[ZS_ROUTING_ITEM * item + 1]; }
    ZS_DEVICE uint32_t tokens(uint32_t item) const { return items[ZS_ROUTING_ITEM * item + 2]; }
};
