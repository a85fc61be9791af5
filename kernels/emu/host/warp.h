// SPDX-License-Identifier: Apache-2.0
// Where lanes of a warp meet: the last to arrive does the work for all.
#pragma once
#include "core.h"

namespace zsemu {
enum Meeting : int { kSyncwarp = 1, kShuffle, kVote, kReduce, kMatch, kLdmatrix, kStmatrix, kMma, kWgmma, kWgmmaCommit, kWgmmaWait, kClusterArrive, kClusterWait };
using Work = void (*)(Warp&, uint32_t mask, void* const* data);
void meet(Meeting kind, uint32_t mask, void* data, Work work, bool whole_warp);
}  // namespace zsemu
